"""Helpers for the tests and benchmarks of this package; not part of its public surface."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import _gpus

__all__ = [
    "assert_matches_reference",
    "assignment_way",
    "deformable_products",
    "deformable_shared_sort",
    "deformable_tiles",
    "error_and_bound",
    "ms_deform_attn_inputs",
    "negative_scores",
    "peak_bytes",
    "poisoned_memory",
]

# Where the reference itself is exact (one key, one sample), twice its error is 0: allow this many units in the last
# place of the largest value instead.
_FLOOR_IN_ULPS = 8


def assert_matches_reference(actual: Tensor, reference: Callable[..., Tensor], *inputs: Any) -> None:
    """Check a kernel's result against ``reference(*inputs)`` evaluated in float64.

    The largest error may be at most twice that of the reference evaluated in the inputs' own dtype, plus a floor of a
    few units in the last place. Shape and dtype must be those of the reference in that dtype.
    """
    error, allowed = error_and_bound(actual, reference, *inputs)
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


def error_and_bound(
    actual: Tensor, reference: Callable[..., Tensor], *inputs: Any, eps: float | None = None
) -> tuple[float, float]:
    """The largest error of a kernel's result, and what :func:`assert_matches_reference` allows.

    ``eps`` is the relative distance of two numbers as the kernel rounds them, by default that of the result's dtype.

    Raises:
        AssertionError: if the shape or the dtype is another one, or a value is not finite.
    """
    expected = reference(*inputs)
    exact = reference(*(_to_double(value) for value in inputs)).double()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    if actual.numel() == 0:
        return 0.0, 0.0
    assert torch.isfinite(actual).all(), "the result has non-finite values"
    floor = _FLOOR_IN_ULPS * (eps or torch.finfo(actual.dtype).eps) * exact.abs().max().item()
    allowed = 2 * (expected.double() - exact).abs().max().item() + floor
    return (actual.double() - exact).abs().max().item(), allowed


@contextmanager
def deformable_tiles(chosen: bool) -> Iterator[None]:
    """Inside, whether the backward pass of ``ms_deform_attn`` goes by tiles on GPUs where it can, as by default.

    Without compiled kernels there is nothing to choose; so it is with :func:`assignment_way`.
    """
    with _chosen("choose_deformable_tiles", chosen):
        yield


@contextmanager
def deformable_shared_sort(chosen: bool) -> Iterator[None]:
    """Inside, whether the backward pass of ``ms_deform_attn`` sorts samples in shared memory on GPUs.

    It then sorts from fewer samples on. By default it does not.
    """
    with _chosen("choose_deformable_shared_sort", chosen):
        yield


@contextmanager
def deformable_products(chosen: bool) -> Iterator[None]:
    """Inside, whether the forward pass of ``ms_deform_attn`` goes by products on tensor cores on GPUs where it can.

    By default it does not.
    """
    with _chosen("choose_deformable_products", chosen):
        yield


@contextmanager
def assignment_way(*, shared_costs: bool | None = None, fixed_point: bool | None = None) -> Iterator[None]:
    """Inside, which way the GPU kernel of ``linear_assignment`` goes; its results are the same either way.

    Args:
        shared_costs: whether it copies costs to shared memory where all problems then still run at the same time, as it
            does by default; None leaves it as it is outside.
        fixed_point: whether it adds up float32 costs as integers where that is exact, as GPUs with slow doubles do by
            default; None as above.
    """
    with _chosen("choose_assignment_shared_costs", shared_costs), _chosen("choose_assignment_fixed_point", fixed_point):
        yield


@contextmanager
def _chosen(function: str, chosen: bool | None) -> Iterator[None]:
    """Inside, a choice between kernels (csrc/choices.h) by this function of the extension; None changes nothing."""
    extension = _gpus.extension()
    if chosen is None or extension is None:
        yield
        return
    choose = getattr(extension, function)
    before = choose(chosen)
    try:
        yield
    finally:
        choose(before)


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


def negative_scores(tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key and value ``[1, tokens, 2, 32]`` that require a gradient, and whose scores are all about -120."""
    query, key, value = (torch.randn(1, tokens, 2, 32, device=device) / 10 for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -120 * 32**0.5
    return [each.to(dtype).requires_grad_() for each in (query, key, value)]


def ms_deform_attn_inputs(
    device: torch.device | str = "cpu",
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    dim: int = 8,
    shapes: Sequence[tuple[int, int]] = ((4, 6), (3, 2)),
    points: int = 3,
    dtype: torch.dtype = torch.float32,
    location_dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Arguments of the operator ``ms_deform_attn``, the same in every call; some locations lie outside of the maps.

    Args:
        shapes: (height, width) of each level.
        dtype: of the value.
        location_dtype: of the locations and weights; by default the one that the kernels compute in.

    Returns:
        value ``[batch, pixels, heads, dim]``; heights and widths in one flat list; locations
        ``[batch, queries, heads, levels, points, 2]``; weights, the same without the 2.
    """
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(dim)
    samples = (batch, queries, heads, len(shapes), points)
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch, pixels, heads, dim, generator=generator, dtype=wide)
    locations = torch.rand(*samples, 2, generator=generator, dtype=wide) * 1.6 - 0.3
    weights = torch.randn(*samples, generator=generator, dtype=wide)
    flat = [size for shape in shapes for size in shape]
    location_dtype = location_dtype or wide
    return value.to(device, dtype), flat, locations.to(device, location_dtype), weights.to(device, location_dtype)


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def peak_bytes(function: Callable[[], object]) -> int:
    """Largest number of bytes that torch's CPU allocator gave out during ``function()``, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no memory"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
