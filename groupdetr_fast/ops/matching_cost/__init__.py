from .op import matching_cost

__all__ = ["matching_cost"]
