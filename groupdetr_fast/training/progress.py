"""What a training shows while it runs: a bar, a line per epoch and, in log files, every so many steps; and curves."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .display import Display
from .processes import mean_losses
from .state import TrainingState
from .step_losses import Losses

__all__ = ["TrainingProgress", "peak_memory_mib", "reset_peak_memory"]

LOG_EVERY = 10  # batches between two points of a TensorBoard curve
LINE_EVERY = 50  # steps between two lines


class TrainingProgress:
    """Reports of a training; the main process alone prints.

    Args:
        accelerator: of the training; its trackers draw the curves.
        state: of the training; it is only read.
        epochs: of the whole run.

    Attributes:
        display: where it is shown.
    """

    def __init__(self, accelerator: Accelerator, state: TrainingState, epochs: int):
        self.accelerator = accelerator
        self.state = state
        self.epochs = epochs
        self.display = Display(accelerator)
        self._since = _Since(time.perf_counter())

    @contextmanager
    def shown(self, lr: float) -> Iterator[None]:
        """Inside, the console has the bar, which begins with this learning rate."""
        state = self.state
        with self.display.bars() as bars:
            self._bars = bars
            self._task = bars.add_task(
                "train",
                total=self.epochs * state.batches_per_epoch,
                completed=state.batches,
                what=f"epoch {state.epoch + 1}",
                status=f"lr {lr:.2g}",  # until there is a loss
            )
            self._since = _Since(time.perf_counter())
            yield

    def step_ended(self, batches: int, losses: dict[str, Tensor], norm: Tensor, *, images: int, waited: float) -> None:
        """Report an optimiser step, inside :meth:`shown`; every process must call this.

        Args:
            batches: of the step.
            losses: of the step, of this process.
            norm: scalar, of the gradient before it was clipped.
            images: of the step, of this process.
            waited: seconds until the batches were there.
        """
        ended = self.state.batches
        self._bars.update(self._task, completed=ended)
        since = self._since
        since.steps, since.batches = since.steps + 1, since.batches + batches
        since.images, since.waited = since.images + images, since.waited + waited
        if since.steps == LINE_EVERY:
            self._print_steps(losses, norm)
            self._since = _Since(time.perf_counter())
        if ended // LOG_EVERY == (ended - batches) // LOG_EVERY:
            return
        rate = self.state.scheduler.get_last_lr()[0]
        values = {f"train/{name}": value.item() for name, value in mean_losses(Losses.of(losses)).items()}
        self.accelerator.log({**values, "train/gradient_norm": norm.item(), "train/lr": rate}, step=ended)
        status = f"loss {values['train/loss']:.3f}  lr {rate:.2g}"
        self._bars.update(self._task, what=f"epoch {self.state.epoch + 1}", status=status)

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics to the curves."""
        self.accelerator.log({f"val/{name}": value for name, value in _numbers(row).items()}, step=self.state.batches)

    def print_epoch(self, row: dict[str, Any]) -> None:
        metrics = _numbers(row)
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75") if name in metrics)
        self.display.print(
            f"epoch {row['epoch']}/{self.epochs}  {row['seconds']:.0f} s  "
            f"loss {row['train'].get('loss', math.nan):.3f}  {shown}"
        )

    def _print_steps(self, losses: dict[str, Tensor], norm: Tensor) -> None:
        """A line on the steps since the last one; the loss and the gradient's norm are those of the newest, here."""
        if not self.accelerator.is_main_process:
            return
        state, since = self.state, self._since
        seconds = time.perf_counter() - since.begin
        per_epoch = state.batches_per_epoch
        left = (self.epochs * per_epoch - state.batches) * seconds / since.batches
        parts = [
            f"epoch {state.epoch + 1}/{self.epochs}  batch {state.current.batches}/{per_epoch}",
            f"loss {losses['loss'].item():.3f}",
            f"lr {state.scheduler.get_last_lr()[0]:.2g}",
            f"{since.images * self.accelerator.num_processes / seconds:.1f} images/s",
            f"waited {100 * since.waited / seconds:.0f} % for data",
            f"gradient {norm.item():.3g}",
            f"{peak_memory_mib():.0f} MiB",
            f"{timedelta(seconds=round(left))} left",
        ]
        self.display.print("  ".join(parts), on_terminal=False)


@dataclass
class _Since:
    """What has happened since a line was printed."""

    begin: float  # by time.perf_counter
    steps: int = 0
    batches: int = 0
    images: int = 0
    waited: float = 0.0


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
