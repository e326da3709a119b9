from .op import PREFERRED_ON, cross_attention

__all__ = ["PREFERRED_ON", "cross_attention"]
