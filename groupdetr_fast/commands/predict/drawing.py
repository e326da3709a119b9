"""A thread that draws while the next images are detected in."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["DrawingThread"]

WAITING = 8  # pictures, at most


class DrawingThread:
    """Does one thing after another. One thread, since neither matplotlib nor a video is made for several."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._waiting: deque[Future[Any]] = deque()

    def add(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Leave a call to the thread, once few others wait for it; what an earlier one has raised is raised here."""
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *arguments))

    def finish(self) -> None:
        """Wait for all of them, and end the thread."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)
