"""Stage ``tune``: tiles of the Triton kernels, the sanitizer on every op, the profiler on the most expensive kernels.

Other processes compile the tiles while this one times those that are ready, each against the launcher's own tile. A
tile is timed only if its results are those of the launcher's own tile, up to rounding. Times are those of the GPU in
the replay of a graph; inputs are in L2 where they fit.
"""

import contextlib
import functools
import gc
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from groupdetr_fast.testing import poisoned_memory
from harness.interleave import in_one_line

from . import clock, tools
from .launches import (
    ATTENTION,
    OTHERS,
    Launch,
    Problem,
    Tile,
    compiled_only,
    default_tile,
    launched,
    tiles,
    with_tile,
)
from .recorder import Recorder

ROUNDS = 5
TOOLS_SECONDS = 45.0  # kept for sanitizer and profiler
PROFILER_SECONDS = 20.0  # of these
ROUNDING = 8  # units in the last place of the largest value, by which results of two tiles may differ
COMPILERS = 13  # processes at most; each has a context on the GPU


def run(recorder: Recorder) -> None:
    if recorder.rehearsal and os.environ.get("TRITON_INTERPRET") != "1":
        _run_interpreted(recorder)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cache = {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", folder)}
        with mock.patch.dict(os.environ, cache), contextlib.ExitStack() as stack:
            # Compiles what the sanitizer will look at.
            plain = tools.Program(tools.every_op("small", "--device", recorder.device.type))
            stack.callback(plain.close)
            compilers = Compilers(2 if recorder.rehearsal else min(COMPILERS, max(1, (os.cpu_count() or 1) - 2)))
            stack.callback(compilers.close)
            gc.freeze()  # a capture may collect garbage
            stack.callback(gc.unfreeze)
            sweep = Sweep(recorder, compilers)
            with _recorded(recorder, "tile"):
                _tune(sweep, recorder.rehearsal)
            compilers.close()
            with _recorded(recorder, "best_tile"):
                sweep.add_best()
            with recorder.row("every_op") as row:
                text, status = plain.finish(min(60 if recorder.rehearsal else 10, recorder.seconds_left))
                if status != 0:
                    row.update(status="missing" if status is None else "wrong", note=tools.reason(text, status))
            with _recorded(recorder, "sanitizer"):
                _sanitize(recorder)
            with _recorded(recorder, "profiler"):
                _profile(recorder)


@contextlib.contextmanager
def _recorded(recorder: Recorder, kind: str) -> Iterator[None]:
    """An error that no row foresees ends this part of the stage, and becomes a row."""
    try:
        yield
    except Exception as error:
        recorder.add(kind, status="missing", note=f"{type(error).__name__}: {in_one_line(error)}")


def _run_interpreted(recorder: Recorder) -> None:
    """The stage in a process in which Triton interprets its kernels; it writes its rows to the same file."""
    command = [sys.executable, "-m", "gpu.tune", str(recorder.folder.resolve()), str(recorder.seconds_left / 60)]
    with recorder.row("rehearsal") as row:
        text, status = tools.Program(command, TRITON_INTERPRET="1").finish(recorder.seconds_left)
        if status != 0:
            row.update(status="wrong", note=tools.reason(text, status))


def _tune(sweep: "Sweep", rehearsal: bool) -> None:
    """Small problems of every kernel with every tile; then large ones, and dropout, with the best of these."""
    if rehearsal:
        tiny = {"queries": 17, "groups": 2, "heads": 1, "layers": 1, "classes": 5, "targets": 3}
        problems = [Problem(kernel, batch=1, **tiny) for kernel in (*ATTENTION, *OTHERS)]
        sweep([([problem], tile) for problem in problems for tile in tiles(problem)[1:3]])
        sweep([([replace(problem, queries=20)], tile) for problem in problems[:1] for tile in sweep.best(1, problem)])
        return
    attention = [(Problem(kernel), Problem(kernel, batch=16)) for kernel in ATTENTION]
    criterion = [(Problem(kernel), Problem(kernel, batch=16)) for kernel in OTHERS]
    sweep(_by_turns(attention))
    best = {small.kernel: sweep.best(5, small, large) for small, large in attention}
    long = [[replace(problem, queries=900) for problem in pair] for pair in attention]
    sweep([(pair, tile) for pair in long for tile in best[pair[0].kernel]])
    sweep(_by_turns([pair[:1] for pair in criterion]))
    sweep([([large], tile) for small, large in criterion for tile in sweep.best(4, small)])
    dropped = [[replace(problem, dropout=0.1) for problem in pair] for pair in attention]
    sweep([(pair, tile) for pair in dropped for tile in best[pair[0].kernel][:4]])


class Job(NamedTuple):
    """A tile and the problems to time it on, of one kernel."""

    problems: Sequence[Problem]
    tile: Tile


def _by_turns(problems: Sequence[Sequence[Problem]]) -> list[Job]:
    """All tiles, the first ones of each kernel before the second ones: the time may not be enough for all."""
    jobs = [(rank, Job(group, tile)) for group in problems for rank, tile in enumerate(tiles(group[0]))]
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


class Compilers:
    """Processes that compile."""

    def __init__(self, count: int):
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, *arguments: Any) -> Future:
        if self._pool is None:
            # spawn: a fork of a process that uses the GPU cannot use it.
            self._pool = ProcessPoolExecutor(self._count, mp_context=get_context("spawn"))
        return self._pool.submit(*arguments)

    def close(self) -> None:
        """Kill them, whatever they are at; the next ``submit`` starts new ones."""
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        self._pool = None


def compile_(problem: Problem, tile: Tile, device: torch.device) -> None:
    """Compile a kernel into Triton's cache on disk."""
    with compiled_only(), _as_runtime_error():
        launch = _prepare(problem, device, to_run=False)
        with with_tile(problem, tile):
            launch()


@functools.lru_cache(maxsize=6)  # those of a sweep come again and again; three kernels, two batches
def _prepare(problem: Problem, device: torch.device, *, to_run: bool = True) -> Launch:
    return problem.prepare(device, to_run=to_run)


@contextlib.contextmanager
def _as_runtime_error() -> Iterator[None]:
    """Triton's errors are of no common kind, and some cannot be sent to another process."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {in_one_line(error)}") from None


class Sweep:
    """Times tiles as they are compiled, and knows which were best."""

    def __init__(self, recorder: Recorder, compilers: Compilers):
        self.recorder = recorder
        self._compilers = compilers
        self._reserve = 0.0 if recorder.rehearsal else TOOLS_SECONDS
        self._ratios: dict[Problem, list[tuple[float, Tile]]] = defaultdict(list)
        self._broken = False  # the GPU does nothing more for this process

    def __call__(self, jobs: Sequence[tuple[Sequence[Problem], Tile]]) -> None:
        left = [Job(*job) for job in jobs]
        # Where a compiler crashes, all of its pool's work is lost; what is left is tried once more.
        reason = self._run(left) or (left and self._run(left))
        if left:
            kernels = sorted({job.problems[0].kernel for job in left})
            note = f"{len(left)} of {len(jobs)} tiles left out: {reason or 'their compiler crashed'}"
            self.recorder.add("tile", kernels=kernels, status="missing", note=note)

    def _run(self, left: list[Job]) -> str:
        """Remove jobs as they are done; why the rest cannot be."""
        if self._broken:
            return "the GPU failed"
        waiting: dict[Future, Job] = {}
        try:
            for job in left:
                # Attention's kernels are the same for all of a job's problems; others are for its first one.
                problem = job.problems[0].compiled_as()
                waiting[self._compilers.submit(compile_, problem, job.tile, self.recorder.device)] = job
            for future in as_completed(waiting, timeout=max(0.0, self._seconds_left)):
                if self._seconds_left <= 0:
                    return "no time"
                if isinstance(future.exception(), BrokenProcessPool):
                    raise future.exception()
                left.remove(waiting[future])
                self._time(waiting[future], future)
                if self._broken:
                    return "the GPU failed"
        except futures.TimeoutError:
            return "no time"
        except BrokenProcessPool:
            self._compilers.close()
        finally:
            for future in waiting:
                future.cancel()
        return ""

    def best(self, count: int, *problems: Problem) -> list[Tile]:
        """The best tiles of each of these problems, without repetition."""
        found = []
        for rank in range(count):
            for problem in problems:
                ranked = sorted(self._ratios.get(problem, []), key=lambda pair: pair[0])
                found += [tile for _, tile in ranked[rank : rank + 1] if tile not in found]
        return found

    def add_best(self) -> None:
        """A row for each problem, with the best of its tiles."""
        for problem, measured in self._ratios.items():
            ratio, tile = min(measured, key=lambda pair: pair[0])
            self.recorder.add("best_tile", **problem.fields(), **tile, over_default=ratio, tiles=len(measured))

    @property
    def _seconds_left(self) -> float:
        return self.recorder.seconds_left - self._reserve

    def _time(self, job: Job, compiled: Future) -> None:
        for problem in job.problems:
            with self.recorder.row("tile", **problem.fields(), **job.tile) as row:
                row["is_default"] = job.tile == default_tile(problem)
                with _as_runtime_error():
                    compiled.result()
                    row.update(self._measure(problem, job.tile))
                    self._ratios[problem].append((row["over_default"], job.tile))
        try:
            if self.recorder.device.type == "cuda":
                torch.cuda.synchronize(self.recorder.device)
        except RuntimeError:
            self._broken = True

    def _measure(self, problem: Problem, tile: Tile) -> dict[str, Any]:
        device = self.recorder.device
        launch = _prepare(problem, device)
        default, expected = _default(problem, device)
        with with_tile(problem, tile):
            with poisoned_memory(), launched() as kernels:
                results = launch()
            _assert_alike(results, expected)
            own = clock.capture([launch] * default.calls, device)
            times = clock.interleaved({"own": own, "default": default}, device, 1 if device.type == "cpu" else ROUNDS)
        first, median, third = (round(1e6 * seconds, 2) for seconds in times["own"])
        (usage,) = [
            {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared_bytes": kernel.metadata.shared}
            for kernel in kernels[-1:]
        ] or [{}]
        return {
            "microseconds": median,
            "q1": first,
            "q3": third,
            "default_microseconds": round(1e6 * times["default"][1], 2),
            "over_default": round(times["own"][1] / times["default"][1], 4),
            **usage,
        }


@functools.lru_cache(maxsize=6)
def _default(problem: Problem, device: torch.device) -> tuple[clock.Captured, tuple[Tensor, ...]]:
    """The launcher's own tile: its work, and what it computes."""
    launch = _prepare(problem, device)
    expected = launch()
    calls = 1 if device.type == "cpu" else max(4, 100 // problem.batch)
    return clock.capture([launch] * calls, device), expected


def _assert_alike(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check the results of a tile against those of the launcher's own."""
    for actual, wanted in zip(results, expected, strict=True):
        if not wanted.dtype.is_floating_point:  # of dropout
            assert torch.equal(actual, wanted), "another dropout mask"
            continue
        # Probabilities are rounded to the half type of the inputs before they are summed in float32.
        precision = torch.finfo(results[0].dtype).eps
        allowed = ROUNDING * precision * wanted.double().abs().max().item()
        error = (actual.double() - wanted.double()).abs().max().item()
        assert error <= allowed, f"differs from the launcher's own tile by {error:.3g}, allowed {allowed:.3g}"


def _sanitize(recorder: Recorder) -> None:
    """Both tools at the same time: neither measures time."""
    found = tools.find("compute-sanitizer")
    with contextlib.ExitStack() as stack:
        running = {}
        for name in ("memcheck", "racecheck") if found and not recorder.rehearsal else ():
            command = tools.sanitizer_command(found, name)
            running[name] = tools.Program(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="2")
            stack.callback(running[name].close)
        for name in ("memcheck", "racecheck"):
            with recorder.row("sanitizer", tool=name) as row:
                if name not in running:
                    raise ImportError("not in a rehearsal" if found else "compute-sanitizer is not installed")
                text, status = running[name].finish(min(60.0, recorder.seconds_left - PROFILER_SECONDS))
                row.update(_verdict(text, status))


def _verdict(text: str, status: int | None) -> dict[str, Any]:
    said = tools.summary(text)
    if said is None:
        return {"status": "missing", "note": tools.reason(text, status)}
    sentence, errors = said
    if not errors and status == 0:
        return {"summary": sentence}
    details = " ".join(line.strip("= ") for line in text.splitlines() if line.startswith("========="))
    return {"status": "wrong", "summary": sentence, "note": f"status {status}: {' '.join(details.split())[:600]}"}


def _profile(recorder: Recorder) -> None:
    """With the metrics of tools.py or, where the profiler does not know one of them, with its basic set."""
    found = tools.find("ncu")
    for metrics in (tuple(tools.METRICS), ()):
        rows = []
        with recorder.row("profiler", metrics="own" if metrics else "basic") as row:
            if recorder.rehearsal or not found:
                raise ImportError("not in a rehearsal" if found else "ncu is not installed")
            if recorder.seconds_left < 5:
                raise RuntimeError("no time")
            program = tools.Program(tools.profiler_command(found, metrics))
            text, status = program.finish(min(40.0, recorder.seconds_left - 1))
            rows = tools.profiles(text)
            row.update({"launches": len(rows)} if rows else {"status": "missing", "note": tools.reason(text, status)})
        for profile in rows:
            recorder.add("profile", **profile)
        if rows or not found or recorder.rehearsal:
            return


if __name__ == "__main__":
    rehearsing = Recorder(
        Path(sys.argv[1]), "tune", device=torch.device("cpu"), minutes=float(sys.argv[2]), rehearsal=True
    )
    run(rehearsing)
    sys.exit(int(rehearsing.found_wrong))
