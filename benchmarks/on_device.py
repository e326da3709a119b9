"""What can be measured of work on a device.

On the CPU time is wall-clock time and the rest is None: enough to test what uses these functions without a GPU.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from interleave import Effort
from torch import Tensor

__all__ = ["count_host_syncs", "peak_bytes", "replay", "seconds_per_call"]

_FLUSHED_BYTES = 256 << 20  # more than any GPU's second cache holds


def seconds_per_call(run: Callable[[], Any], device: torch.device, effort: Effort) -> list[float]:
    """The time of single calls, after one that is not counted, by CUDA events.

    Before each call the GPU's caches are emptied. This also gives the host a start, so that short work takes the time
    of its kernels; work of many small kernels takes the time of their launches.
    """
    if device.type != "cuda":
        run()
        return _repeat(lambda: _wall_clock(run), effort)
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)

    def sample() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    sample()
    return _repeat(sample, effort)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that torch had allocated during a call, less what was allocated before."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def count_host_syncs(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often a call makes the host wait for the GPU, as far as torch notices."""
    run()  # the first call may compile kernels
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def replay(run: Callable[[], Tensor], device: torch.device) -> Tensor | None:
    """The result of a call when it is replayed from a CUDA graph.

    Raises:
        RuntimeError: if the work cannot be captured.
    """
    if device.type != "cuda":
        run()
        return None
    side = torch.cuda.Stream(device)  # a capture wants its warm-up on a stream of its own
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    result.zero_()
    graph.replay()
    return result


def _wall_clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _repeat(sample: Callable[[], float], effort: Effort) -> list[float]:
    fewest, most = effort.rounds
    seconds = [sample()]
    rounds = min(max(fewest, int(effort.seconds / max(seconds[0], 1e-9))), most)
    return seconds + [sample() for _ in range(rounds - 1)]
