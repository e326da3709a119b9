"""The ops of the package, as functions on tensors; see each function's docstring.

Every op has a PyTorch reference in its folder (``reference.py``), which is its meaning and its fallback; ``backends()``
tells what runs where, and ``missing_kernels()`` why where it is the reference.
"""

from .._library import backends, load_extension, missing_kernels
from .cross_attention import cross_attention
from .grouped_attention import grouped_attention
from .linear_assignment import linear_assignment
from .matching_cost import matching_cost
from .ms_deform_attn import ms_deform_attn
from .sigmoid_focal_loss import IGNORED, NO_OBJECT, sigmoid_focal_loss

load_extension()

__all__ = [
    "IGNORED",
    "NO_OBJECT",
    "backends",
    "cross_attention",
    "grouped_attention",
    "linear_assignment",
    "matching_cost",
    "missing_kernels",
    "ms_deform_attn",
    "sigmoid_focal_loss",
]
