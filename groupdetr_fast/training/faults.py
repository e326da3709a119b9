"""What can stop a training from outside, and how it ends then."""

import signal
import threading
from types import FrameType

__all__ = ["EXIT_STOPPED", "StopRequest", "TrainingError", "TrainingStopped"]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again with --resume


class TrainingError(ValueError):
    """A training that cannot go on; the message says why and what to do."""


class TrainingStopped(Exception):
    """A training that was asked to stop, and has written a checkpoint to go on from."""


class StopRequest:
    """A context in which SIGTERM is only noted, so that the training can stop where a checkpoint can be written.

    Python delivers signals to the main thread alone; in another one the context changes nothing.

    Attributes:
        received: whether the signal has come.
    """

    def __init__(self):
        self.received = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
