"""What can stop a training from outside, and how it ends then."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["EXIT_STOPPED", "StopRequest", "TrainingError", "TrainingStopped", "deaths_of_workers_explained"]

WORKER_DIED = "DataLoader worker (pid"  # what torch's errors begin with when a worker was killed
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again with --resume


class TrainingError(ValueError):
    """A training that cannot go on; the message says why and what to do."""


class TrainingStopped(Exception):
    """A training that was asked to stop, and has written a checkpoint to go on from."""


class StopRequest:
    """A context in which SIGTERM and SIGINT (Ctrl-C) are only noted, so that the training can stop with a checkpoint.

    A second SIGINT interrupts at once. Python delivers signals to the main thread alone; in another one the context
    changes nothing.

    Attributes:
        received: whether the signal has come.
    """

    def __init__(self):
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True


@contextmanager
def deaths_of_workers_explained(workers: int) -> Iterator[None]:
    """Turn the errors that a killed worker causes into a sentence; others pass.

    Args:
        workers: number of processes that load images.

    Raises:
        TrainingError: if one of them died.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        broken_pipe = not isinstance(error, RuntimeError) and workers > 0
        if not (broken_pipe or str(error).startswith(WORKER_DIED)):
            raise
        raise TrainingError(
            f"a process that loads images died ({error}): perhaps memory ran out, for which fewer workers "
            "help; resuming goes on from the newest checkpoint"
        ) from None
