"""The command ``groupdetr analyze cost``."""

from dataclasses import dataclass

import torch

from ...analysis import experiments, plots
from ...analysis.cost import CostSettings, measure_cost
from .common import Analysis, count_of, require_groups

__all__ = ["CostCommand"]


@dataclass(frozen=True, kw_only=True)
class CostCommand(Analysis):
    """Time and memory of training steps for each number of groups, one after the other and nothing beside them.

    Attributes:
        groups: K. Takes the place of ``num_groups``.
        steps: steps that count.
        warmup: steps before them.
    """

    groups: tuple[int, ...] = (1, 2, 3, 5, 7, 9, 11)
    steps: int = 50
    warmup: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_groups(self.groups)
        for name, least in {"steps": 1, "warmup": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        _ = self.images  # which refuses "auto": it could be another number for each K

    @property
    def images(self) -> int:
        """Images of an optimiser step."""
        return self.optimization.images_per_batch * self.optimization.accumulate

    def __call__(self) -> None:
        training, rows = self.training(), []
        for num_groups in self.groups:
            settings = CostSettings(experiments.with_groups(training, num_groups), self.warmup, self.steps)
            measured = measure_cost(settings, self.output / "cost" / f"k{num_groups:02d}", threads=self.threads)
            rows.append({"num_groups": num_groups, **measured})
        processor = f"CPU, {count_of(self.threads, 'thread')}"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
        self.write(
            "cost",
            plots.draw_cost(rows),
            "What groups cost in training",
            f"Seconds of an optimiser step on {self.images} images (median, 20th and 80th percentile of "
            f"{self.steps} steps, without loading images), and peak memory of the process or GPU, in MiB; "
            f"{device}, seed {self.optimization.seed}.",
            rows,
            rows,
        )
