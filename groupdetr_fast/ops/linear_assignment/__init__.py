from .op import linear_assignment

__all__ = ["linear_assignment"]
