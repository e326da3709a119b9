"""What can stop a training from outside, and how it ends then."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

__all__ = [
    "AGAIN",
    "EXIT_STOPPED",
    "StopRequest",
    "TrainingError",
    "TrainingStopped",
    "deaths_of_processes_explained",
    "deaths_of_workers_explained",
    "lack_of_memory_explained",
    "obey_parent_alone",
]

WORKER_DIED = "DataLoader worker (pid"  # what torch's errors begin with when a worker was killed
# What the errors of collectives say when a process at the other end is gone: gloo's, and NCCL's.
PROCESS_DIED = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError")
RESUME = "resuming goes on from the newest checkpoint"
AGAIN = "run the same command again"
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again with --resume


class TrainingError(ValueError):
    """A training that cannot go on; the message says why and what to do."""


class TrainingStopped(Exception):
    """A training that was asked to stop, and has written a checkpoint to go on from."""


class StopRequest:
    """A context in which SIGTERM and Ctrl-C are only noted: the training stops where a checkpoint can be written.

    A second Ctrl-C interrupts at once. Python delivers signals to the main thread alone; in another one the context
    changes nothing.

    Attributes:
        received: whether a signal has come.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


def obey_parent_alone(worker: int) -> None:
    """Let a process that loads images end only when its training ends it; a ``worker_init_fn`` of a DataLoader.

    A launcher, a scheduler or a terminal sends its signal to all processes at once, and a training whose workers have
    died cannot go on to the place where a checkpoint can be written. Where the system does not tell who has sent a
    signal (macOS), SIGTERM is obeyed.

    Args:
        worker: its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def deaths_of_workers_explained(workers: int, then: str = RESUME) -> Iterator[None]:
    """Turn the errors that a killed worker causes into a sentence; others pass.

    Args:
        workers: number of processes that load images.
        then: how to go on.

    Raises:
        TrainingError: if one of them died.
    """
    try:
        yield
    except Exception as error:
        broken_pipe = isinstance(error, ConnectionError | EOFError) and workers > 0
        death = error if broken_pipe else _death_behind(error)
        if death is None:
            raise
        _hear_of_no_further_death()
        raise TrainingError(
            f"a process that loads images died ({death}): perhaps memory ran out, for which fewer workers help; {then}"
        ) from None


def _death_behind(error: BaseException | None) -> BaseException | None:
    """torch's error of a killed worker.

    It comes wherever the program is, also where a RuntimeError is made another error, as in looking up an op of torch,
    and where another error follows it, as in closing what it has left half done.
    """
    while error is not None and not str(error).startswith(WORKER_DIED):
        if isinstance(error, TrainingError | TrainingStopped):  # who has raised it knew what came before
            return None
        error = error.__cause__ or error.__context__
    return error


def _hear_of_no_further_death() -> None:
    """Keep torch from raising the error again, wherever the program is when the other workers end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def deaths_of_processes_explained(then: str = RESUME) -> Iterator[None]:
    """Turn the error of a process that waits in vain for another one into a sentence; others pass.

    Args:
        then: how to go on.

    Raises:
        TrainingError: if another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in PROCESS_DIED):
            raise
        raise TrainingError(
            "another process of this command has ended: what it said last, or who killed it, is the reason, and not "
            f"this process; {then}"
        ) from None


@contextmanager
def lack_of_memory_explained(batch_size: int) -> Iterator[None]:
    """Turn the error of a device without memory left into a sentence that says what takes less.

    Args:
        batch_size: images per process and step.

    Raises:
        TrainingError: if memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device ran out of memory: pass --groups-per-pass 1, --recompute-layers or --precision bf16, or less "
            f"than --batch-size {batch_size} and as much more --accumulate ({str(error).partition('. ')[0]})"
        ) from None
