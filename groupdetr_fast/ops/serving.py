"""What is asked about one op, or one GPU, before the op is put into a model of another package."""

from .. import _gpus as gpus
from .._library import kinds_of

__all__ = ["compiled_kernels_run_on", "kinds_of"]


def compiled_kernels_run_on(index: int) -> bool:
    """Whether there is compiled code for a GPU, which initialises CUDA."""
    return gpus.why_not_compiled(index) is None
