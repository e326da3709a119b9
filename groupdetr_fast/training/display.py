"""Where trainings and evaluations show how far they are: bars on a terminal, and lines elsewhere and in log files."""

import logging
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

__all__ = ["Display", "RunLog"]

SECONDS_BETWEEN_LINES = 30.0  # of an evaluation

# What the console shows, for log files: without a handler of its own it goes nowhere, as the console has it already.
_shown = logging.getLogger(f"{__name__}.shown")
_shown.propagate = False
_shown.addHandler(logging.NullHandler())
_shown.setLevel(logging.INFO)


class Display:
    """Bars and lines of the main process; the others show nothing.

    Args:
        accelerator: of the training or the evaluation.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.console = Console(stderr=True)
        self._bars: Progress | None = None

    @contextmanager
    def bars(self) -> Iterator[Progress]:
        """Inside, the terminal has a place for bars; a call inside another one shares its place.

        Their tasks have the fields ``what``, which comes before the bar, and ``status``, after it.
        """
        if self._bars is not None:
            yield self._bars
            return
        columns = (
            TextColumn("{task.fields[what]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        quiet = not (self.accelerator.is_main_process and self.console.is_terminal)
        with Progress(*columns, console=self.console, disable=quiet) as bars:
            self._bars = bars
            try:
                yield bars
            finally:
                self._bars = None

    def evaluated(self, loader: DataLoader[Any]) -> Generator[Any, None, None]:
        """The batches of a loader to evaluate, while it is shown how far they have come.

        Args:
            loader: as the accelerator prepared it.
        """
        begin = shown = time.perf_counter()
        images = 0
        with self.bars() as bars:
            task = bars.add_task("evaluate", total=len(loader), what="evaluating", status="")
            try:
                for done, batch in enumerate(loader, start=1):
                    yield batch
                    images += len(batch.image_ids)
                    now = time.perf_counter()
                    rate = images * self.accelerator.num_processes / (now - begin)
                    bars.update(task, completed=done, status=f"{rate:.1f} images/s ")
                    if now - shown >= SECONDS_BETWEEN_LINES:
                        shown = now
                        left = timedelta(seconds=round((now - begin) / done * (len(loader) - done)))
                        line = f"evaluated batch {done}/{len(loader)}  {rate:.1f} images/s  {left} left"
                        self.print(line, on_terminal=False)
            finally:
                bars.remove_task(task)

    def print(self, line: str, *, on_terminal: bool = True) -> None:
        """Show a line and log it; without ``on_terminal`` a terminal, whose bar shows as much, does not get it."""
        if self.accelerator.is_main_process:
            _shown.info(line)
            if on_terminal or not self.console.is_terminal:
                # A file has no width to break lines at.
                self.console.print(line, soft_wrap=True, highlight=self.console.is_terminal)


class RunLog:
    """A file that gets, inside, what the package logs and what trainings show; it goes on where it ended.

    Where nothing is configured, warnings are printed too, as Python does as long as there is no handler at all.

    Args:
        path: of the file; None for none, as in all processes but the main one.
        held: keep what the file is to get until :meth:`release`, or until an error; without either it gets nothing.
    """

    def __init__(self, path: Path | None, *, held: bool = False):
        self.path = path
        self.held = held

    def __enter__(self) -> "RunLog":
        self._added: list[tuple[logging.Logger, logging.Handler]] = []
        if self.path is None:
            return self
        self._file = logging.FileHandler(self.path, delay=True)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._buffer = MemoryHandler(sys.maxsize if self.held else 0, sys.maxsize, self._file, flushOnClose=False)
        package = logging.getLogger(__name__.partition(".")[0])
        self._added = [(package, self._buffer), (_shown, self._buffer)]
        if logging.lastResort is not None and not package.hasHandlers():
            self._added.append((package, logging.lastResort))
        for logger, each in self._added:
            logger.addHandler(each)
        return self

    def release(self) -> None:
        """Write what was held, and from now on whatever comes."""
        self.held = False
        if self._added:
            self._buffer.capacity = 0
            self._buffer.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.release()
        for logger, each in self._added:
            logger.removeHandler(each)
        if self._added:
            self._buffer.close()
            self._file.close()
