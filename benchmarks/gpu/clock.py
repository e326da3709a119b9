"""Times, memory and host synchronisations of work on a device.

On the CPU times are wall-clock times and the rest is None: enough to rehearse what uses these functions.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.interleave import in_turn, quartiles

__all__ = [
    "Captured",
    "HostTimes",
    "Pool",
    "capture",
    "count_host_syncs",
    "eager_times",
    "host_syncs",
    "host_times",
    "interleaved",
    "peak_bytes",
    "synchronize",
]

WARM_UP = 3  # calls: the first ones compile, allocate and choose algorithms


class Captured(NamedTuple):
    """Work to do again and again: ``replay()`` does ``calls`` calls and returns the last one's result.

    A graph writes its result to the same tensors each time.
    """

    replay: Callable[[], Any]
    calls: int


class Pool:
    """Memory that several graphs share, so that only the results of the last one to be replayed are good.

    Each graph would else keep what it needs for itself, and the caching allocator blocks for each stream.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.handle = torch.cuda.graph_pool_handle() if on_gpu else None
        self.stream = torch.cuda.Stream(device) if on_gpu else None


def capture(runs: Sequence[Callable[[], Any]], device: torch.device, pool: Pool | None = None) -> Captured:
    """Record calls, one after another, in one CUDA graph, so that the host takes no part in their time.

    With a pool other threads and libraries may initialise themselves meanwhile; without one the capture is as strict as
    torch's is by default.

    Raises:
        RuntimeError: if the work cannot be captured.
    """
    if device.type != "cuda":
        return Captured(lambda: [run() for run in runs][-1], len(runs))
    mode = "global" if pool is None else "relaxed"
    pool = pool or Pool(device)
    pool.stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(pool.stream):  # a capture wants its warm-up on a stream of its own
        for _ in range(WARM_UP):
            runs[0]()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode=mode):
        for run in runs:
            result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return Captured(replay, len(runs))


def interleaved(work: Mapping[str, Captured], device: torch.device, rounds: int) -> dict[str, tuple[float, ...]]:
    """First quartile, median and third quartile of the seconds of one call; every round does all of the work once."""
    seconds: dict[str, list[float]] = {key: [] for key in work}
    for captured in work.values():
        captured.replay()
    for number in range(rounds):
        for key in in_turn(work, number):
            seconds[key].append(_elapsed(work[key].replay, device) / work[key].calls)
    return {key: quartiles(values) for key, values in seconds.items()}


def _elapsed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


class HostTimes(NamedTuple):
    """Seconds of one call: until its result is there, and until the host is free for the next one."""

    wall: float
    host: float


def eager_times(run: Callable[[], Any], device: torch.device, *, calls: int = 20, rounds: int = 5) -> HostTimes:
    """Medians over rounds of ``calls`` calls one after another, of which nobody waits for the results."""
    run()
    samples = [host_times(run, device, calls) for _ in range(rounds)]
    return HostTimes(*map(statistics.median, zip(*samples, strict=True)))


def host_times(run: Callable[[], Any], device: torch.device, calls: int) -> HostTimes:
    """Means over ``calls`` calls one after another, of which nobody waits for the results."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    queued = time.perf_counter()
    synchronize(device)
    return HostTimes((time.perf_counter() - start) / calls, (queued - start) / calls)


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
    places = host_syncs(run, device)
    return None if places is None else len(places)


def host_syncs(run: Callable[[], Any], device: torch.device) -> list[str] | None:
    """Where a call makes the host wait for the GPU, as far as torch notices: ``file:line`` of every time."""
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
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work; on the CPU it is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
