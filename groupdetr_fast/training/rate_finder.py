"""A sweep of the learning rate: how the loss of a few hundred steps behaves while the rate rises (Smith 2017)."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from ..field_types import take_field_types
from .display import Display
from .engine import Trainer
from .faults import TrainingError
from .processes import mean_losses
from .step_losses import Losses

__all__ = ["RateSweep", "SweepSettings", "sweep_rate"]

SMOOTHING = 0.98  # of the moving average of the loss, as in fastai
DIVERGED = 4.0  # times the smallest smoothed loss
EVERY = 20  # steps between two lines
LEAST = 10  # steps from which a rate can be suggested


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Where a sweep begins and ends.

    Attributes:
        rate_from: learning rate of the first step.
        rate_to: learning rate of the last step.
        rate_steps: optimiser steps; fewer where the loss diverges before.

    Raises:
        ValueError: if the rates do not rise, or the steps are too few.
    """

    rate_from: float = 1e-7
    rate_to: float = 0.1
    rate_steps: int = 200

    def __post_init__(self) -> None:
        take_field_types(self, SweepSettings)
        if not 0 < self.rate_from < self.rate_to < math.inf:
            raise ValueError(f"rate_from must be positive and below rate_to, got {self.rate_from} and {self.rate_to}")
        if self.rate_steps < LEAST:
            raise ValueError(f"rate_steps must be at least {LEAST}, got {self.rate_steps}")

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0: from one to the next it rises by the same factor."""
        return float(self.rate_from * (self.rate_to / self.rate_from) ** (step / (self.rate_steps - 1)))


@dataclass(frozen=True)
class RateSweep:
    """What a sweep has found, step by step.

    Attributes:
        rates: learning rates of everything but the backbone, rising.
        losses: of each step, mean over processes.
        smoothed: moving averages of them, without the bias of its beginning.
        diverged: whether the loss rose so far that the sweep ended.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool

    @property
    def valley(self) -> float:
        """The rate in the middle of the longest fall of the smoothed loss: fastai's rule, and the suggestion.

        The longest fall is the longest selection of steps, in their order, of which each has a smaller loss than the
        one before.
        """
        before: list[int] = [-1] * len(self.smoothed)
        lengths = [1] * len(self.smoothed)
        for step, loss in enumerate(self.smoothed):
            for earlier in range(step):
                if self.smoothed[earlier] > loss and lengths[earlier] >= lengths[step]:
                    lengths[step], before[step] = lengths[earlier] + 1, earlier
        last = first = max(range(len(lengths)), key=lambda step: lengths[step])
        while before[first] >= 0:
            first = before[first]
        return self.rates[(first + last) // 2]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest against the logarithm of the rate: Lightning's rule."""
        slopes = [self.smoothed[step + 1] - self.smoothed[step - 1] for step in range(1, len(self.smoothed) - 1)]
        return self.rates[1 + min(range(len(slopes)), key=lambda index: slopes[index])]


def sweep_rate(trainer: Trainer, settings: SweepSettings) -> RateSweep:
    """Train with a rate that rises from step to step, and look at the loss.

    All groups of the optimiser keep the proportion of their rates. The trainer's model, its optimiser and its state are
    changed, and are not to be trained further; nothing is written.

    Args:
        trainer: at the beginning of a training, whose own schedule does not matter.
        settings: where the sweep begins and ends.

    Raises:
        TrainingError: if the loss was not finite in one of the first steps.
        ValueError: if the rate of everything but the backbone is 0, to which the others are in proportion.
    """
    optimizer: Any = trainer.state.optimizer
    if trainer.config.lr == 0:
        raise ValueError("lr must not be 0, since the rates of all groups of parameters stay in proportion to it")
    proportions = [group["initial_lr"] / trainer.config.lr for group in optimizer.param_groups]
    display = Display(trainer.accelerator)
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    for batches in itertools.islice(trainer.endless_steps(), settings.rate_steps):
        rate = settings.rate(len(rates))
        for group, proportion in zip(optimizer.param_groups, proportions, strict=True):
            group["lr"] = rate * proportion
        loss = _loss_of_step(trainer, batches)
        if not math.isfinite(loss):
            diverged = True
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        rates.append(rate)
        losses.append(loss)
        smoothed.append(average / (1 - SMOOTHING ** len(rates)))
        if len(rates) % EVERY == 0:
            display.print(f"step {len(rates)}/{settings.rate_steps}  lr {rate:.2g}  loss {smoothed[-1]:.3f}")
        diverged = smoothed[-1] > DIVERGED * min(smoothed)
        if diverged:
            break
    if len(rates) < LEAST:
        raise TrainingError(
            f"the loss diverged after {len(rates)} steps, at the rate {settings.rate(len(rates)):.2g}: begin with a "
            "lower rate_from"
        )
    return RateSweep(tuple(rates), tuple(losses), tuple(smoothed), diverged)


def _loss_of_step(trainer: Trainer, batches: list[Any]) -> float:
    """The loss of a step, mean over processes; the host waits for it."""
    try:
        losses = trainer.run_step(batches)
    except ValueError as error:
        # The losses of transformers refuse boxes that are no numbers; of several processes, others may have none.
        if trainer.accelerator.num_processes > 1 or "nan" not in str(error):
            raise
        return math.nan
    return float(mean_losses(Losses.of(losses))["loss"])
