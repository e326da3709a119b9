"""How far a prediction has come: a bar on a terminal, elsewhere a line every half minute."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar"]

SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """Counts images or frames.

    Args:
        what: is counted: images, or frames of a video.
        total: how many there will be; None if that is not known.
    """

    def __init__(self, what: str, total: int | None):
        self.what, self.total, self.done = what, total, 0
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID = self._progress.add_task(what, total=total, rate="")
        self._begin = self._shown = time.perf_counter()

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        now = time.perf_counter()
        rate = f"{self.done / max(now - self._begin, 1e-9):.1f}/s"
        self._progress.update(self._task, completed=self.done, rate=rate)
        if not self._console.is_terminal and now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            of = "" if self.total is None else f" of {self.total}"
            self._console.print(f"{self.what}: {self.done}{of}, {rate}", soft_wrap=True, highlight=False)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
