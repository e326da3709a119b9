"""What the measurements of ``groupdetr analyze`` share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from ...analysis import experiments
from ...analysis.experiments import Cell, Row
from ...analysis.report import Measurement, write_measurement
from ...analysis.run import Run, RunResults
from ...analysis.steps import train_and_measure
from ...analysis.sweep import check_limits, default_jobs, run_sweep
from ...data import AugmentationConfig
from ...data.config import DataConfig
from ...models.checkpoints import CheckpointHeader, read_header
from ...runs.config import CocoTrainingConfig, ModelConfig
from ...runs.config_file import to_json
from ...runs.demo import with_digits
from ...training.config import OptimizationConfig

__all__ = ["USAGES", "Analysis", "OfCheckpoint", "OverSteps", "Sweep", "count_of", "header_of", "require_groups"]

USAGES = ("AP_one_group", "AP_one_group_nms", "AP_all_queries", "AP_all_queries_nms")


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What all measurements share: a training, whose settings they vary.

    Attributes:
        data: images and annotations; without any, the embedded digits.
        model: the detector; ``num_queries`` are those of one group.
        augmentation: sizes and probabilities of the augmentation.
        optimization: schedule, rates, batch; ``seed`` is the first seed.
        threads: CPU threads of a run.
        output: folder of the results.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    threads: int = 1
    output: Path = Path("runs/analysis")
    command: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be positive, got {self.threads}")

    def training(self) -> CocoTrainingConfig:
        """The training that the runs vary; composes the digits on first use, if there is no other data.

        Raises:
            ValueError: for settings that do not fit together; no digits are composed for these.
        """
        training = self._of_flags()
        return training if self.data.given else replace(training, data=with_digits(self.data))

    def _of_flags(self) -> CocoTrainingConfig:
        """The same with the data of the flags, perhaps none."""
        return CocoTrainingConfig(
            data=self.data, model=self.model, augmentation=self.augmentation, optimization=self.optimization
        )

    def write(
        self,
        name: str,
        figure: Figure,
        title: str,
        caption: str,
        rows: Sequence[Row],
        summary: Sequence[Row],
        settings: Mapping[str, Any] | None = None,
        differences: Sequence[Row] = (),
    ) -> None:
        """Write the measurement's files; ``settings`` are those of the training unless given."""
        settings = to_json(self.training()) if settings is None else settings
        measurement = Measurement(name, title, caption, self.command, rows, summary, settings, differences)
        write_measurement(measurement, figure, self.output)


@dataclass(frozen=True, kw_only=True)
class OverSteps(Analysis):
    """What the measurements have in common that look at a training every so many steps.

    Attributes:
        steps: optimiser steps to train; 0 to measure the model as it is, such as that of ``load``.
        every: steps between two measurements.
        batches: of the evaluation set, over which a measurement is averaged.
    """

    steps: int = 200
    every: int = 20
    batches: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        for name in ("every", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.images  # which refuses "auto": captions say of how many images a measurement is

    def rows_of(self, measure: Callable[..., Row], words: Callable[[Row], str]) -> list[Row]:
        """Train and measure.

        Args:
            measure: see ``analysis.steps.train_and_measure``.
            words: what to print of a measurement as soon as it is made.
        """
        torch.set_num_threads(self.threads)
        rows = []
        limits = {"steps": self.steps, "every": self.every, "batches": self.batches}
        for row in train_and_measure(replace(self.training(), output=self.output), measure, **limits):
            rows.append(row)
            print(f"step {row['step']}: {words(row)}", flush=True)
        return rows

    @property
    def images(self) -> int:
        """Images of a measurement, if the evaluation set has as many."""
        return self.batches * self.optimization.images_per_batch


@dataclass(frozen=True, kw_only=True)
class Sweep(Analysis):
    """What the measurements that train have in common.

    Attributes:
        seeds: runs of every setting, with the seeds ``seed``, ``seed + 1``, ...
        jobs: runs at a time; None for two, or with a GPU one for each core, or for two cores if workers load images.
        memory_gib: limit of the memory of all runs together in GiB, or None for 80 % of what is free at the start.
        gpu_memory_gib: the same for the memory of each GPU, or None for 90 % of what is free at the start.
        nms_threshold: IoU above which non-maximum suppression drops a box.
        evaluate_every: epochs between evaluations.
        checkpoint_minutes: minutes after which a run writes a checkpoint within an epoch; 0 for none.
        top_k: detections per image in evaluation.
        output: folder of the results; the runs are in its folder ``runs`` and serve every measurement.
    """

    seeds: int = 3
    jobs: int | None = None
    memory_gib: float | None = None
    gpu_memory_gib: float | None = None
    nms_threshold: float = 0.7
    evaluate_every: int = 1
    checkpoint_minutes: float = 1.0
    top_k: int = CocoTrainingConfig.top_k

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        check_limits(jobs=self.jobs, memory_gib=self.memory_gib, gpu_memory_gib=self.gpu_memory_gib)
        if not 0 <= self.nms_threshold <= 1:
            raise ValueError(f"nms_threshold must be in [0, 1], got {self.nms_threshold}")

    def _of_flags(self) -> CocoTrainingConfig:
        """See :class:`Analysis`."""
        own = ("evaluate_every", "checkpoint_minutes", "top_k")
        return replace(super()._of_flags(), **{name: getattr(self, name) for name in own})

    def resolved_jobs(self) -> int:
        """``jobs``, or what None stands for on this machine."""
        return default_jobs(self.data.resolved_workers()) if self.jobs is None else self.jobs

    def seed_range(self) -> range:
        """The seeds of every setting."""
        return range(self.optimization.seed, self.optimization.seed + self.seeds)

    def own_cells(self, seeds: Iterable[int]) -> list[Cell]:
        """The training with its own number of groups, once for each seed."""
        return experiments.group_cells(self.training(), (self.model.num_groups,), (), seeds)

    def make(self, cells: Sequence[Cell]) -> list[tuple[Cell, Run, RunResults]]:
        """Make the runs of a measurement that are not done yet; the results of all of them."""
        runs = [Run(cell.training, self.nms_threshold) for cell in cells]
        results = run_sweep(
            runs,
            self.output / "runs",
            jobs=self.resolved_jobs(),
            threads=self.threads,
            memory_gib=self.memory_gib,
            gpu_memory_gib=self.gpu_memory_gib,
        )
        return [(cell, run, results[run.name]) for cell, run in zip(cells, runs, strict=True)]

    def seeds_in_words(self) -> str:
        """For captions."""
        if self.seeds == 1:
            return f"seed {self.optimization.seed}."
        return f"seeds {', '.join(map(str, self.seed_range()))}; mean and sample standard deviation over seeds."


@dataclass(frozen=True, kw_only=True)
class OfCheckpoint(Sweep):
    """What the measurements have in common that train, or take a checkpoint.

    Attributes:
        checkpoint: measure this checkpoint of ``groupdetr train`` and train nothing; ``load`` is the same.
    """

    checkpoint: Path | None = None

    def given_checkpoint(self) -> Path | None:
        """The checkpoint to be measured; None if models are to be trained.

        Raises:
            ValueError: if two are given.
        """
        if self.checkpoint is not None and self.model.load is not None:
            raise ValueError("give --checkpoint or --load, not both: each is the checkpoint to be measured")
        return self.checkpoint or self.model.load


def header_of(checkpoint: Path) -> CheckpointHeader:
    """The header of a checkpoint of ``groupdetr train``.

    Raises:
        ValueError: for any other file.
    """
    header = read_header(checkpoint)
    if header.model is None or not header.model_config:
        raise ValueError(f"checkpoint {checkpoint} does not say which detector it is of: give one of groupdetr train")
    return header


def require_groups(groups: Sequence[int]) -> None:
    """Check numbers of groups that runs are to have.

    Raises:
        ValueError: if there are none, or there is one below 1.
    """
    if not groups or min(groups) < 1:
        raise ValueError(f"groups must be numbers from 1 on, got {', '.join(map(str, groups)) or 'none'}")


def count_of(number: int, noun: str) -> str:
    """A number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
