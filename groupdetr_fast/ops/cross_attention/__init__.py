from .op import cross_attention, is_preferred

__all__ = ["cross_attention", "is_preferred"]
