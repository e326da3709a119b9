"""Many runs, a few at a time, each in a process of its own; what is done is skipped."""

import logging
import os
import subprocess
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.config import usable_cores
from ..training.faults import StopRequest, TrainingStopped
from .forking import ForkedRun, ForkError, ForkServer, forks_are_safe, thread_limits
from .gpus import SharedGpu, shared_gpus
from .run import Run, RunResults, run_command

__all__ = ["SweepError", "check_limits", "default_jobs", "run_sweep"]

logger = logging.getLogger(__name__)

LOG = "log.txt"
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between two looks at the memory of GPUs
STOP_SECONDS = 60  # for a run to write a checkpoint when it is asked to stop
DEFAULT_MEMORY_SHARE = 0.8  # of what is available when the sweep begins


class SweepError(ValueError):
    """Runs of a sweep that failed; the message names the first and what it said last."""


def default_jobs(workers: int) -> int:
    """Runs at a time: two, or with a GPU as many as have a core, or two where others prepare the images of one.

    Args:
        workers: processes of each run that load images.
    """
    return max(2, usable_cores() // (2 if workers else 1)) if torch.cuda.device_count() else 2


def run_sweep(
    runs: Iterable[Run],
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    memory_gib: float | None = None,
    gpu_memory_gib: float | None = None,
) -> dict[str, RunResults]:
    """Make the runs that are not done yet, those that were interrupted from their last checkpoint on.

    Small runs do not fill a GPU, since the host launches their work kernel by kernel; so several share one, each in a
    process of its own. Those with most left to do begin, so that at the end none runs alone for long. Of several GPUs
    each run gets the one with the fewest among those that have room for it; one run at a time sees all GPUs.

    Args:
        runs: each is made once, however often it occurs.
        folder: has a folder for each run, named by its settings, with what it printed in ``log.txt``.
        jobs: runs at a time.
        threads: CPU threads of each.
        memory_gib: limit of the memory of all runs together, in GiB; by default 80 % of what is free now. When it is
            exceeded, the run that was started last stops and goes on later; a single run may exceed it.
        gpu_memory_gib: limit of the memory of all runs on a GPU, in GiB; by default 90 % of what is free now. The first
            run trains an epoch alone, which shows what one takes. A run that finds no memory beside others is made
            again with fewer of them.

    Returns:
        The results of each run under its name.

    Raises:
        SweepError: if runs failed; the others are made nevertheless.
        TrainingStopped: after SIGTERM, once all runs have ended.
        ValueError: if ``jobs``, ``threads`` or a limit is not positive, or if nvidia-smi does not tell a GPU's memory.
    """
    check_limits(jobs=jobs, threads=threads, memory_gib=memory_gib, gpu_memory_gib=gpu_memory_gib)
    limit = psutil.virtual_memory().available * DEFAULT_MEMORY_SHARE if memory_gib is None else memory_gib * 2**30
    unique = {run.name: run for run in runs}
    pool = _Pool(unique, folder, jobs, threads, limit)
    if jobs > 1 and pool.waiting:
        pool.gpus = shared_gpus(gpu_memory_gib)
    try:
        pool.work()
    finally:
        pool.close()
    if pool.failed:
        name, reason = next(iter(pool.failed.items()))
        raise SweepError(
            f"{len(pool.failed)} of {len(unique)} runs failed; {name}: {reason} (see {folder / name / LOG})"
        )
    return {name: RunResults.read(folder / name) for name in unique}


def check_limits(**limits: float | None) -> None:
    """Check the limits of :func:`run_sweep`, by their names; None is for a default.

    Raises:
        ValueError: if one is not positive.
    """
    for name, value in limits.items():
        if value is not None and not value > 0:  # which also refuses what is not a number
            raise ValueError(f"{name} must be positive, got {value}")


@dataclass
class _Worker:
    """A run's process."""

    name: str
    process: psutil.Popen | ForkedRun
    gpu: SharedGpu | None

    def leave(self) -> None:
        """Say that the process has ended."""
        if self.gpu is not None:
            self.gpu.runs -= 1

    def memory(self) -> int:
        """Bytes in use by the process and those that load its images."""
        try:
            family = [self.process, *self.process.children(recursive=True)]
            return sum(member.memory_info().rss for member in family)
        except psutil.NoSuchProcess:  # it has just ended
            return 0

    def stop(self) -> None:
        """End the process, which may write a checkpoint first."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        except ForkError:  # nobody can tell its exit status any more, but whether it is there
            try:
                psutil.Process.wait(self.process, STOP_SECONDS)
            except psutil.TimeoutExpired:
                self.process.kill()


class _Pool:
    def __init__(
        self,
        runs: dict[str, Run],
        folder: Path,
        jobs: int,
        threads: int,
        memory_limit: float,
    ):
        self.runs = runs
        self.folder = folder
        self.jobs = jobs
        self.threads = threads
        self.memory_limit = memory_limit
        self.gpus: list[SharedGpu] = []  # that runs share
        self.looked = monotonic()
        self.size_is_known = False  # whether a run has trained an epoch since the sweep began
        self.largest = 0  # memory of a run, as far as seen
        self.epochs = {name: run.epochs_done(folder / name) for name, run in runs.items()}
        work = {name: run.work(run.epochs - self.epochs[name]) for name, run in runs.items()}
        undone = [name for name, run in runs.items() if not run.is_done(folder / name)]
        self.waiting = deque(sorted(undone, key=lambda name: -work[name]))
        self.forks: ForkServer | None = None
        self.active: list[_Worker] = []
        self.failed: dict[str, str] = {}

    def work(self) -> None:
        """Make all runs."""
        logger.info("%d of %d runs are done already", len(self.runs) - len(self.waiting), len(self.runs))
        if not self.waiting:
            return
        columns = (
            TextColumn("runs {task.fields[done]}/{task.fields[runs]}"),
            BarColumn(),
            TextColumn("epochs {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[names]}"),
        )
        progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600)
        with StopRequest() as stop, progress:
            total = sum(run.epochs for run in self.runs.values())
            task = progress.add_task("sweep", total=total, done=0, runs=len(self.runs), names="")
            try:
                while self.waiting or self.active:
                    if stop.received:
                        raise TrainingStopped("the sweep was asked to stop: the same command goes on from here")
                    self._look()
                    self._reap()
                    self._keep_the_limit()
                    self._fill()
                    done = len(self.runs) - len(self.waiting) - len(self.active)
                    names = " ".join(worker.name for worker in self.active)
                    progress.update(task, completed=sum(self.epochs.values()), done=done, names=names)
                    if self.active:
                        time.sleep(POLL_SECONDS)
            finally:
                for worker in self.active:  # all at once: each may write a checkpoint
                    worker.process.terminate()
                for worker in self.active:
                    worker.stop()

    def _look(self) -> None:
        """Take note of the epochs that are done, and of the memory of GPUs."""
        known = self.size_is_known
        for worker in self.active:
            done = self.runs[worker.name].epochs_done(self.folder / worker.name)
            self.size_is_known |= done > self.epochs[worker.name]
            self.epochs[worker.name] = done
        now = monotonic()
        if self.size_is_known and (not known or now - self.looked >= LOOK_SECONDS):
            self.looked = now
            for gpu in self.gpus:
                gpu.look()

    def _reap(self) -> None:
        """Take note of the runs that have ended."""
        for worker in [worker for worker in self.active if worker.process.poll() is not None]:
            self.active.remove(worker)
            worker.leave()
            if worker.process.returncode != 0:
                lines = (self.folder / worker.name / LOG).read_text(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"exit status {worker.process.returncode}"
                if worker.gpu is not None and worker.gpu.runs > 0 and "out of memory" in reason.lower():
                    logger.warning("run %s found no memory beside %d others and waits", worker.name, worker.gpu.runs)
                    worker.gpu.was_full()
                    self.waiting.appendleft(worker.name)
                    continue
                self.failed[worker.name] = reason
                logger.error("run %s failed: %s", worker.name, reason)

    def _keep_the_limit(self) -> None:
        sizes = [worker.memory() for worker in self.active]
        self.largest = max(self.largest, *sizes, 0)
        if len(self.active) > 1 and sum(sizes) > self.memory_limit:
            newest = self.active.pop()
            logger.warning("run %s waits until there is more memory", newest.name)
            newest.stop()
            newest.leave()
            self.waiting.appendleft(newest.name)

    def _fill(self) -> None:
        """Start runs while there is room for one more of the largest size that was seen."""
        while self.waiting and len(self.active) < self.jobs:
            used = sum(worker.memory() for worker in self.active)
            if self.active and used + self.largest > self.memory_limit:
                return
            with_room = [gpu for gpu in self.gpus if gpu.has_room(self.size_is_known)]
            if self.gpus and not with_room:
                return
            gpu = min(with_room, key=lambda gpu: gpu.runs, default=None)
            name = self.waiting.popleft()
            self.runs[name].prepare(self.folder / name)
            process = self._start(self.folder / name, {} if gpu is None else gpu.environment())
            if gpu is not None:
                gpu.runs += 1
            self.active.append(_Worker(name, process, gpu))

    def _start(self, folder: Path, environment: dict[str, str]) -> psutil.Popen | ForkedRun:
        """Start the process of a run: a fork of one that has imported everything, where that is possible."""
        if forks_are_safe():
            self.forks = self.forks or ForkServer(self.threads)
            return self.forks.start(folder, folder / LOG, environment)
        variables = os.environ | thread_limits(self.threads) | environment
        with (folder / LOG).open("a") as log:
            return psutil.Popen(run_command(folder), stdout=log, stderr=subprocess.STDOUT, env=variables)

    def close(self) -> None:
        """End what was started to start runs."""
        if self.forks is not None:
            self.forks.close()
