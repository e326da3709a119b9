"""The command ``groupdetr find-rate``."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..runs.find_rate import find_rate
from ..training.rate_finder import SweepSettings
from .train import TrainCommand, training_defaults

__all__ = ["FindRateCommand", "sweep_defaults"]


@dataclass(frozen=True, kw_only=True)
class FindRateCommand(TrainCommand):
    """Suggest a learning rate: train a few hundred steps while the rate rises, and look where the loss falls.

    The command line of a training, with find-rate in place of train; what concerns evaluation and checkpoints does not
    matter:
    groupdetr find-rate --data-path DIR --backbone-weights imagenet

    No weights are written. The rates of the backbone and of its layers stay in proportion to --lr.

    Attributes:
        sweep: where the sweep begins and ends.
    """

    sweep: SweepSettings = field(default_factory=SweepSettings)
    output: Path = Path("runs/rate")

    def __call__(self) -> None:
        find_rate(self, self.sweep)


def sweep_defaults(arguments: Sequence[str]) -> FindRateCommand:
    """What the flags start from: those of the training, but for its folder."""
    training = training_defaults(arguments)
    settings = {each.name: getattr(training, each.name) for each in fields(TrainCommand)}
    return FindRateCommand(**{**settings, "output": FindRateCommand.output})
