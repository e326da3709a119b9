from .op import grouped_attention

__all__ = ["grouped_attention"]
