"""The subcommands of ``groupdetr analyze``: the paper's measurements on data and sizes of one's own."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from matplotlib.figure import Figure

from ..coco_training import CocoTrainingConfig, DataConfig, DataPaths, ModelConfig, digits_demo
from ..data import AugmentationConfig
from ..inference import InferenceSettings
from ..models.checkpoints import CheckpointHeader, build_detector, read_header
from ..training.optimization import OptimizationConfig
from . import experiments, plots
from .cost import CostSettings, measure_cost
from .distances import COLUMNS as DISTANCE_COLUMNS
from .distances import query_positions
from .experiments import Cell, Row, average
from .inference import evaluate_groups, load_weights
from .json_files import to_json
from .report import Measurement, write_measurement, write_page
from .run import Run, RunResults
from .sweep import run_sweep

__all__ = ["analyze_command"]

DATA_FLAGS = ("--data-path", "--coco-path", "--train-", "--val-")
DEMO_EPOCHS = 12
_APS = ("AP_one_group", "AP_one_group_nms", "AP_all_queries", "AP_all_queries_nms")


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

    def training(self) -> CocoTrainingConfig:
        """The training that the runs vary; composes the digits on first use, if there is no other data."""
        data = self.data
        files = [each.name for each in fields(DataPaths)]
        if not any(getattr(data, name) for name in files):
            demo = digits_demo().data
            data = replace(data, **{name: getattr(demo, name) for name in files})
        return CocoTrainingConfig(
            data=data, model=self.model, augmentation=self.augmentation, optimization=self.optimization
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
    ) -> None:
        """Write the measurement's files; ``settings`` are those of the training unless given."""
        settings = to_json(self.training()) if settings is None else settings
        write_measurement(Measurement(name, title, caption, self.command, rows, summary, settings), figure, self.output)


@dataclass(frozen=True, kw_only=True)
class Sweep(Analysis):
    """What the measurements that train have in common.

    Attributes:
        seeds: runs of every setting, with the seeds ``seed``, ``seed + 1``, ...
        jobs: runs at a time.
        memory_gib: limit of the memory of all runs together in GiB, or None for 80 % of what is free at the start.
        nms_threshold: IoU above which non-maximum suppression drops a box.
        evaluate_every: epochs between evaluations.
        top_k: detections per image in evaluation.
        output: folder of the results; the runs are in its folder ``runs`` and serve every measurement.
    """

    seeds: int = 3
    jobs: int = 2
    memory_gib: float | None = None
    nms_threshold: float = 0.7
    evaluate_every: int = 1
    top_k: int = CocoTrainingConfig.top_k

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    def training(self) -> CocoTrainingConfig:
        """See :class:`Analysis`."""
        return replace(super().training(), evaluate_every=self.evaluate_every, top_k=self.top_k)

    def seed_range(self) -> range:
        """The seeds of every setting."""
        return range(self.optimization.seed, self.optimization.seed + self.seeds)

    def make(self, cells: Sequence[Cell]) -> list[tuple[Cell, Run, RunResults]]:
        """Make the runs of a measurement that are not done yet; the results of all of them."""
        runs = [Run(cell.training, self.nms_threshold) for cell in cells]
        results = run_sweep(
            runs, self.output / "runs", jobs=self.jobs, threads=self.threads, memory_gib=self.memory_gib
        )
        return [(cell, run, results[run.name]) for cell, run in zip(cells, runs, strict=True)]

    def seeds_in_words(self) -> str:
        """For captions."""
        if self.seeds == 1:
            return f"seed {self.optimization.seed}."
        return f"seeds {', '.join(map(str, self.seed_range()))}; mean and sample standard deviation over seeds."


@dataclass(frozen=True, kw_only=True)
class AssignmentCommand(Sweep):
    """Figure 1: one-to-one, naive one-to-many and group-wise one-to-many assignment with equal numbers of queries.

    Attributes:
        groups: K; the runs have K times ``num_queries`` queries, and K positives for each object where there are many.
            Takes the place of ``num_groups``.
    """

    groups: tuple[int, ...] = (1, 3, 5, 7, 11)

    def __call__(self) -> None:
        cells = experiments.assignment_cells(self.training(), self.groups, self.seed_range())
        rows = [experiments.result_row(*made) for made in self.make(cells)]
        summary = average(rows, ("assignment", "queries"), (*_APS, "minutes"))
        self.write(
            "assignment",
            plots.draw_assignment(summary),
            "Figure 1: assignment and number of queries",
            "AP (COCO, 0 to 1) at the end of trainings of equal length. One-to-one and one-to-many assignment use all "
            "queries in inference, group-wise assignment those of one group. NMS drops boxes of one class that overlap "
            f"by an IoU above {self.nms_threshold:g}; {self.seeds_in_words()}",
            rows,
            summary,
        )


@dataclass(frozen=True, kw_only=True)
class SweepGroupsCommand(Sweep):
    """Tables 1 and 2: AP against the number of groups at equal epochs, and against training time.

    Attributes:
        groups: K of the runs. Takes the place of ``num_groups``.
        baseline_epochs: lengths of further trainings with one group, for a comparison at equal time.
    """

    groups: tuple[int, ...] = (1, 2, 3, 5, 7, 9, 11)
    baseline_epochs: tuple[int, ...] = ()

    def __call__(self) -> None:
        training = self.training()
        made = self.make(experiments.group_cells(training, self.groups, self.baseline_epochs, self.seed_range()))
        rows = [experiments.result_row(*one) for one in made]
        keys = ("num_groups", "epochs")
        values = ("AP_one_group", "AP50_one_group", "AP75_one_group", "minutes", "seconds_per_epoch", "peak_memory_mib")
        summary = average(rows, keys, values)
        points = [
            {**cell.labels, "epoch": row["epoch"], "AP": row["metrics"]["AP"]}
            for cell, _, results in made
            for row in results.epochs
            if "metrics" in row
        ]
        curves = average(points, (*keys, "epoch"), ("AP",))
        epochs = training.optimization.resolved().epochs
        self.write(
            "sweep_groups",
            plots.draw_sweep(summary, curves, epochs),
            "Tables 1 and 2: the number of groups",
            f"AP (COCO, 0 to 1) of group 0: against the number of groups K after {epochs} epochs, against the epoch, "
            f"and at the end against the minutes spent in training steps, with {_count(self.jobs, 'run')} at "
            f"a time on {_count(self.threads, 'thread')} each; {self.seeds_in_words()}",
            rows,
            summary,
        )


@dataclass(frozen=True, kw_only=True)
class AblationCommand(Sweep):
    """Table 7: group-wise assignment and separate self-attention, each with and without the other."""

    def __call__(self) -> None:
        made = self.make(experiments.ablation_cells(self.training(), self.seed_range()))
        rows = [experiments.result_row(*one) for one in made]
        summary = average(rows, ("variant",), (*_APS, "minutes"))
        self.write(
            "ablation",
            plots.draw_ablation(summary),
            "Table 7: what the parts of Group DETR contribute",
            f"AP (COCO, 0 to 1) with K = {self.model.num_groups} groups, or K positives for each object: of one group "
            "used alone, of all queries, and of all queries after NMS at an IoU of "
            f"{self.nms_threshold:g}; {self.seeds_in_words()}",
            rows,
            summary,
        )


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

    def __call__(self) -> None:
        training, rows = self.training(), []
        for num_groups in self.groups:
            settings = CostSettings(experiments.with_groups(training, num_groups), self.warmup, self.steps)
            measured = measure_cost(settings, self.output / "cost" / f"k{num_groups:02d}", threads=self.threads)
            rows.append({"num_groups": num_groups, **measured})
        images = training.optimization.batch_size * training.optimization.accumulate
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {_count(self.threads, 'thread')}"
        self.write(
            "cost",
            plots.draw_cost(rows),
            "What groups cost in training",
            f"Seconds of an optimiser step on {images} images (median, 20th and 80th percentile of {self.steps} steps, "
            "without loading images), and peak memory of the process or GPU, in MiB; "
            f"{device}, seed {self.optimization.seed}.",
            rows,
            rows,
        )


@dataclass(frozen=True, kw_only=True)
class ReferencePointsCommand(Sweep):
    """Figure 3: the reference points of all groups over the image plane, of one run or checkpoint.

    Attributes:
        checkpoint: show this checkpoint of ``groupdetr train`` and train nothing.
    """

    checkpoint: Path | None = None

    def __call__(self) -> None:
        checkpoint, source = self.checkpoint, f"checkpoint {self.checkpoint}"
        if checkpoint is None:
            _, run, results = self.make(_first_seed(self))[0]
            checkpoint, source = results.checkpoint, f"run {run.name}"
        header = _header(checkpoint)
        model = build_detector(header)
        load_weights(model, checkpoint)
        positions = query_positions(model).tolist()
        rows = [
            {"group": group, "query": query, "x": x, "y": y}
            for group, points in enumerate(positions)
            for query, (x, y) in enumerate(points)
        ]
        summary = average(rows, ("group",), ("x", "y"))
        self.write(
            "reference_points",
            plots.draw_reference_points(rows),
            "Figure 3: reference points of all groups",
            f"Reference points of {len(positions)} groups of {len(positions[0])} queries, relative to the image; "
            f"{source}. Table: mean and standard deviation over the queries of each group.",
            rows,
            [{name.replace("runs", "queries"): value for name, value in row.items()} for row in summary],
            settings=header.model_config,
        )


@dataclass(frozen=True, kw_only=True)
class DistancesCommand(Sweep):
    """Figure 4: perturbation distance and matching distance (equations 6 and 7) against the training step."""

    def __call__(self) -> None:
        training = self.training()
        cells = experiments.group_cells(training, (self.model.num_groups,), (), self.seed_range())
        rows = [
            {"seed": cell.labels["seed"], **row} for cell, _, results in self.make(cells) for row in results.distances
        ]
        if not rows:
            raise ValueError("distances need at least 2 groups of queries that have learned positions, in one pass")
        steps = sorted({row["step"] for row in rows})
        shown = {steps[len(steps) * part // 8] for part in range(8)} | {steps[-1]}
        self.write(
            "distances",
            plots.draw_distances(rows),
            "Figure 4: perturbation distance (PD) and matching distance (MD)",
            f"Distances between the reference points of {self.model.num_groups} groups relative to the image, averaged "
            "over all pairs of groups; MD of the last decoder layer and the objects of one batch; "
            f"{self.seeds_in_words()}",
            rows,
            average([row for row in rows if row["step"] in shown], ("step",), DISTANCE_COLUMNS[1:]),
        )


@dataclass(frozen=True, kw_only=True)
class GroupApCommand(Sweep):
    """AP of each group of a trained model, used alone: any group can serve (section 3.2).

    Attributes:
        checkpoint: evaluate this checkpoint of ``groupdetr train``, as its training did, and train nothing.
    """

    checkpoint: Path | None = None

    def __call__(self) -> None:
        training = self.training()
        if self.checkpoint is None:
            cells = experiments.group_cells(training, (self.model.num_groups,), (), self.seed_range())
            models = {
                f"seed {cell.labels['seed']}": (cell.training, results.checkpoint)
                for cell, _, results in self.make(cells)
            }
        else:
            models = {str(self.checkpoint): (_as_trained(training, self.checkpoint), self.checkpoint)}
        rows = [
            {"model": name, "group": group, **{key: metrics[key] for key in ("AP", "AP50", "AP75")}}
            for name, (config, checkpoint) in models.items()
            for group, metrics in enumerate(evaluate_groups(config, checkpoint))
        ]
        self.write(
            "group_ap",
            plots.draw_group_ap(rows),
            "AP of each group used alone",
            f"AP (COCO, 0 to 1) of each group of {_count(len(models), 'trained model')}: {', '.join(models)}. "
            "Table: mean and sample standard deviation over the groups of each model.",
            rows,
            [
                {name.replace("runs", "groups"): value for name, value in row.items()}
                for row in average(rows, ("model",), ("AP", "AP50", "AP75"))
            ],
        )


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write the page that shows every measurement in the folder; the other commands do so too.

    Attributes:
        output: folder of the results.
    """

    output: Path = Analysis.output

    def __call__(self) -> None:
        print(write_page(self.output))


_COMMANDS = {
    "assignment": AssignmentCommand,
    "sweep-groups": SweepGroupsCommand,
    "ablation": AblationCommand,
    "cost": CostCommand,
    "reference-points": ReferencePointsCommand,
    "distances": DistancesCommand,
    "group-ap": GroupApCommand,
}


def analyze_command(arguments: Sequence[str]) -> type:
    """The command ``analyze`` with its subcommands, as a dataclass for ``tyro.cli`` whose instances are called.

    Args:
        arguments: the whole command line. Without flags that name data, the defaults are those of the digits demo.
    """
    if any(argument.replace("_", "-").startswith(DATA_FLAGS) for argument in arguments):
        config = CocoTrainingConfig()
    else:
        config = digits_demo(compose=False)
        config = replace(config, optimization=replace(config.optimization, epochs=DEMO_EPOCHS), evaluate_every=3)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values |= {"command": shlex.join(("groupdetr", *arguments)), "output": Analysis.output}
    commands = []
    for name, kind in _COMMANDS.items():
        default = kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
        commands.append(Annotated[kind, tyro.conf.subcommand(name, default=default)])
    commands.append(Annotated[ReportCommand, tyro.conf.subcommand("report")])
    subcommands = Union[tuple(commands)]  # noqa: UP007 (a union of a list)

    @dataclass(frozen=True)
    class AnalyzeCommand:
        """Repeat the paper's measurements."""

        measurement: subcommands

        def __call__(self) -> None:
            self.measurement()

    return AnalyzeCommand


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _first_seed(analysis: Sweep) -> list[Cell]:
    return experiments.group_cells(analysis.training(), (analysis.model.num_groups,), (), [analysis.optimization.seed])


def _header(checkpoint: Path) -> CheckpointHeader:
    header = read_header(checkpoint)
    if header.model is None or not header.model_config:
        raise ValueError(f"checkpoint {checkpoint} does not say which detector it is of: give one of groupdetr train")
    return header


def _as_trained(training: CocoTrainingConfig, checkpoint: Path) -> CocoTrainingConfig:
    """The training with the detector that a checkpoint is of, its labels, its sizes of images and its normalisation."""
    header = _header(checkpoint)
    model = ModelConfig.of_checkpoint(header)
    data = replace(training.data, labels=header.labels)
    augmentation = InferenceSettings.from_header(header).augmentation
    return replace(training, model=model, data=data, augmentation=augmentation)
