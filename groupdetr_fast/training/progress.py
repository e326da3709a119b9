"""What a training shows while it runs: a bar and a line per epoch on the console, and TensorBoard's curves."""

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from .processes import mean_losses
from .state import TrainingState

__all__ = ["TrainingProgress", "peak_memory_mib", "reset_peak_memory"]

LOG_EVERY = 10  # batches between two points of a TensorBoard curve


class TrainingProgress:
    """Reports of a training; the main process alone prints.

    Args:
        accelerator: of the training; its trackers draw the curves.
        state: of the training; it is only read.
        epochs: of the whole run.
    """

    def __init__(self, accelerator: Accelerator, state: TrainingState, epochs: int):
        self.accelerator = accelerator
        self.state = state
        self.epochs = epochs
        self.console = Console(stderr=True)

    @contextmanager
    def shown(self, lr: float) -> Iterator[None]:
        """Inside, the console has the bar, which begins with this learning rate."""
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}lr {task.fields[lr]:.2g}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        state, quiet = self.state, not self.accelerator.is_main_process
        with Progress(*columns, console=self.console, disable=quiet) as bar:
            self._bar = bar
            self._task = bar.add_task(
                "train",
                total=self.epochs * state.batches_per_epoch,
                completed=state.batches,
                epoch=state.epoch + 1,
                loss="",  # until there is one
                lr=lr,
            )
            yield

    def step_ended(self, batches: int, losses: dict[str, Tensor] | None) -> None:
        """Report an optimiser step, inside :meth:`shown`; every process must call this.

        Args:
            batches: of the step.
            losses: None if the step was skipped.
        """
        ended = self.state.batches
        self._bar.update(self._task, completed=ended)
        if losses is None or ended // LOG_EVERY == (ended - batches) // LOG_EVERY:
            return
        rate = self.state.scheduler.get_last_lr()[0]
        values = {f"train/{name}": value.item() for name, value in mean_losses(losses).items()}
        self.accelerator.log({**values, "train/lr": rate}, step=ended)
        self._bar.update(self._task, epoch=self.state.epoch + 1, loss=f"loss {values['train/loss']:.3f}  ", lr=rate)

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics to the curves."""
        self.accelerator.log({f"val/{name}": value for name, value in _numbers(row).items()}, step=self.state.batches)

    def print_epoch(self, row: dict[str, Any]) -> None:
        metrics = _numbers(row)
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75") if name in metrics)
        self.print(
            f"epoch {row['epoch']}/{self.epochs}  {row['seconds']:.0f} s  "
            f"loss {row['train'].get('loss', math.nan):.3f}  {shown}"
        )

    def print(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(line)


def peak_memory_mib() -> float:
    """Peak memory in MiB: of the GPU since :func:`reset_peak_memory` if there is one, else of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak_memory() -> None:
    """Let the peak of a GPU be counted anew; that of a process cannot be."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of an epoch that are one number; none where it was not evaluated."""
    return {name: value for name, value in row.get("metrics", {}).items() if isinstance(value, float)}
