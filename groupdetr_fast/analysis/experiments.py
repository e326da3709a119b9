"""Which runs each measurement consists of, and what is read from their results."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..losses.matcher import Assignment
from ..runs.config import CocoTrainingConfig
from .run import Run, RunResults

__all__ = [
    "VARIANTS",
    "Cell",
    "ablation_cells",
    "assignment_cells",
    "average",
    "group_cells",
    "paired_differences",
    "result_row",
    "with_groups",
]

Row = dict[str, Any]

# Table 7: the name of each row, whether self-attention stays inside the groups, and how targets are assigned.
VARIANTS: dict[str, tuple[bool, Assignment]] = {
    "one group": (False, "one_to_one"),
    "neither (naive one-to-many)": (False, "one_to_many"),
    "separate self-attention only": (True, "one_to_many"),
    "group assignment only": (False, "group"),
    "both (Group DETR)": (True, "group"),
}

CONFIDENCE = 0.95  # of intervals

ASSIGNMENTS: tuple[Assignment, ...] = ("one_to_one", "one_to_many", "group")  # of figure 1


@dataclass(frozen=True)
class Cell:
    """One run of a measurement: what it stands for in the table, and its training."""

    labels: Mapping[str, Any]
    training: CocoTrainingConfig


def with_groups(
    training: CocoTrainingConfig, num_groups: int, *, separate: bool = True, assignment: Assignment = "group"
) -> CocoTrainingConfig:
    """The same training with ``num_groups`` times as many queries, in which each object has as many positives.

    Args:
        training: a training, whose number of queries is that of one group.
        num_groups: K.
        separate: whether self-attention stays inside the groups.
        assignment: see ``losses.matcher.GroupMatcher``; with "one_to_one" each object has one positive.
    """
    size = training.model.resolved_num_queries()
    if num_groups == 1:  # where all assignments and layouts are the same
        separate, assignment = True, "group"
    positives = None
    if assignment != "one_to_one" and not separate:
        positives = num_groups
    if not separate:
        num_groups, size = 1, num_groups * size
        if assignment == "one_to_one":
            assignment = "group"  # of all queries as one group
    layout = replace(training.model, num_groups=num_groups, num_queries=size)
    return replace(training, model=layout, assignment=assignment, positives=positives)


def group_cells(
    training: CocoTrainingConfig, groups: Sequence[int], baseline_epochs: Sequence[int], seeds: Iterable[int]
) -> list[Cell]:
    """Tables 1 and 2: every number of groups for the training's epochs, and one group for some others."""
    epochs = training.optimization.resolved().epochs
    pairs = [(num_groups, epochs) for num_groups in groups]
    pairs += [(1, number) for number in baseline_epochs if (1, number) not in pairs]
    cells = []
    for seed in seeds:
        for num_groups, number in pairs:
            labels = {"num_groups": num_groups, "epochs": number, "seed": seed}
            cells.append(Cell(labels, _seeded(_with_epochs(with_groups(training, num_groups), number), seed)))
    return cells


def assignment_cells(training: CocoTrainingConfig, groups: Sequence[int], seeds: Iterable[int]) -> list[Cell]:
    """Figure 1: three assignments with equal numbers of queries, those of each number of groups."""
    size = training.model.resolved_num_queries()
    cells = []
    for seed in seeds:
        for num_groups in groups:
            for assignment in ASSIGNMENTS:
                config = with_groups(training, num_groups, separate=assignment == "group", assignment=assignment)
                labels = {"assignment": assignment, "queries": num_groups * size, "seed": seed}
                cells.append(Cell(labels, _seeded(config, seed)))
    return cells


def ablation_cells(training: CocoTrainingConfig, seeds: Iterable[int]) -> list[Cell]:
    """Table 7: groups with and without separate self-attention and group-wise assignment."""
    cells = []
    for seed in seeds:
        for variant, (separate, assignment) in VARIANTS.items():
            num_groups = 1 if assignment == "one_to_one" else training.model.num_groups
            config = with_groups(training, num_groups, separate=separate, assignment=assignment)
            cells.append(Cell({"variant": variant, "seed": seed}, _seeded(config, seed)))
    return cells


def result_row(cell: Cell, run: Run, results: RunResults) -> Row:
    """What a finished run contributes to a table; AP in [0, 1], time of the training steps alone."""
    seconds = [row["seconds"] for row in results.epochs]
    row = {**cell.labels, "run": run.name}
    for usage, metrics in results.usages.items():
        row |= {f"{name}_{usage}": metrics[name] for name in ("AP", "AP50", "AP75")}
    return row | {
        "minutes": sum(seconds) / 60,
        "seconds_per_epoch": statistics.median(seconds),
        "peak_memory_mib": max(row["peak_memory_mib"] for row in results.epochs),
    }


def average(rows: Iterable[Row], keys: Sequence[str], values: Sequence[str], *, counted: str = "runs") -> list[Row]:
    """Mean and spread over the rows that share ``keys``, in the order in which they first occur.

    Args:
        rows: one for each run, or for whatever ``counted`` names.
        keys: columns whose values are kept apart.
        values: columns that are averaged.
        counted: what a row stands for: the name of the column with their number.

    Returns:
        Per combination of keys: the keys, the number of rows, and for each value ``<value>`` (mean) and
        ``<value>_std`` (sample standard deviation; None for a single row). Missing numbers (None, nan) are left out;
        None if none is left.
    """
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        together.setdefault(tuple(row[key] for key in keys), []).append(row)
    averages = []
    for combination, members in together.items():
        entry: Row = {**dict(zip(keys, combination, strict=True)), counted: len(members)}
        for value in values:
            numbers = [row[value] for row in members if not _is_missing(row[value])]
            entry[value] = statistics.mean(numbers) if numbers else None
            entry[f"{value}_std"] = statistics.stdev(numbers) if len(numbers) > 1 else None
        averages.append(entry)
    return averages


def paired_differences(
    rows: Iterable[Row], keys: Sequence[str], baseline: Sequence[Any], values: Sequence[str]
) -> list[Row]:
    """How far runs are from the baseline's run of the same seed, on average, and how sure that is.

    Runs of one seed see their images in the same order, so that their difference varies less than each of them.

    Args:
        rows: one for each run, with ``seed``.
        keys: columns whose values are kept apart.
        baseline: the values of these columns in the rows that the others are compared to.
        values: columns that are compared.

    Returns:
        Per combination of keys but the baseline's: the keys, ``seeds`` (how many have both runs), and for each value
        ``<value>_difference``, the mean, with ``<value>_from`` and ``<value>_to``, the ends of its interval of 95 % by
        Student's t; these are None for a single seed. Missing numbers (None, nan) are left out; combinations that
        share no seed with the baseline are not there.
    """
    from scipy.stats import t as student

    by_seed: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        by_seed.setdefault(tuple(row[key] for key in keys), {})[row["seed"]] = row
    of_baseline = by_seed.pop(tuple(baseline), {})
    compared = []
    for combination, runs in by_seed.items():
        shared = sorted(set(runs) & set(of_baseline))
        if not shared:
            continue
        entry: Row = {**dict(zip(keys, combination, strict=True)), "seeds": len(shared)}
        for value in values:
            pairs = [(runs[seed][value], of_baseline[seed][value]) for seed in shared]
            found = [own - other for own, other in pairs if not (_is_missing(own) or _is_missing(other))]
            mean = statistics.mean(found) if found else None
            entry |= {f"{value}_difference": mean, f"{value}_from": None, f"{value}_to": None}
            if mean is not None and len(found) > 1:
                error = statistics.stdev(found) / math.sqrt(len(found))
                half = float(student.ppf(0.5 + CONFIDENCE / 2, len(found) - 1)) * error
                entry |= {f"{value}_from": mean - half, f"{value}_to": mean + half}
        compared.append(entry)
    return compared


def _is_missing(number: float | None) -> bool:
    return number is None or math.isnan(number)


def _seeded(training: CocoTrainingConfig, seed: int) -> CocoTrainingConfig:
    return replace(training, optimization=replace(training.optimization, seed=seed))


def _with_epochs(training: CocoTrainingConfig, epochs: int) -> CocoTrainingConfig:
    """The same training for another number of epochs; drops that were given keep their distance to the end."""
    given, resolved = training.optimization, training.optimization.resolved()
    drop = None
    if given.lr_drop is not None or given.schedule is not None:
        drop = tuple(max(1, epoch + epochs - resolved.epochs) for epoch in resolved.drops)
    return replace(training, optimization=replace(resolved, epochs=epochs, lr_drop=drop))
