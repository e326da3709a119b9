from .op import cross_attention, is_fused

__all__ = ["cross_attention", "is_fused"]
