"""Helpers for the tests and benchmarks of this package; not part of its public surface."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_matches_reference", "poisoned_memory"]

# Where the reference itself is exact (one key, one sample), twice its error is 0: allow this many units in the last
# place of the largest value instead.
_FLOOR_IN_ULPS = 8


def assert_matches_reference(actual: Tensor, reference: Callable[..., Tensor], *inputs: Any) -> None:
    """Check a kernel's result against ``reference(*inputs)`` evaluated in float64.

    The largest error may be at most twice that of the reference evaluated in the inputs' own dtype, plus a floor of a
    few units in the last place. Shape and dtype must be those of the reference in that dtype.
    """
    expected = reference(*inputs)
    exact = reference(*(_to_double(value) for value in inputs)).double()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "the result has non-finite values"
    floor = _FLOOR_IN_ULPS * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    allowed = 2 * (expected.double() - exact).abs().max().item() + floor
    error = (actual.double() - exact).abs().max().item()
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch allocates without initialising it (also in C++ kernels) is filled with NaN."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value
