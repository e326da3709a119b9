"""From benchmarks/results/*.csv to tables, the list of goals, and plots.

python benchmarks summary            print goals and tables
python benchmarks summary --write    and put tables and plots into docs/
"""

import argparse
import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

from harness import cases
from harness.documents import ON_CPUS, PERFORMANCE, significant, table, write_section
from harness.places import DOCS, RESULTS
from harness.results import OURS
from paper.flops import step_operations

SECTION, GOALS_SECTION = "cpu", "cpu_goals"
COMMAND = "make bench"
IMAGES = DOCS / "images"

Row = dict[str, str]


class Measured(NamedTuple):
    """What a goal is about, with its quartiles."""

    first: float
    median: float
    third: float


@dataclass(frozen=True)
class Goal:
    """A number that should be at least (or, with ``at_most``, at most) as large as ``limit``."""

    work: str
    against: str
    limit: float
    measure: Callable[["SavedResults"], Measured]
    at_most: bool = False

    def verdict(self, measured: Measured) -> str:
        if self.at_most:
            return "met" if measured.median <= self.limit else self._unless(measured.first <= self.limit)
        return "met" if measured.median >= self.limit else self._unless(measured.third >= self.limit)

    @staticmethod
    def _unless(reached: bool) -> str:
        return "within the spread" if reached else "missed"


class SavedResults:
    """Rows of a folder's csv files, one file for each comparison of TITLES."""

    def __init__(self, folder: Path):
        self.comparisons: dict[str, list[Row]] = {}
        for name in TITLES:
            path = folder / f"{name}.csv"
            if path.exists():
                with path.open(newline="") as file:
                    self.comparisons[name] = list(csv.DictReader(file))

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.comparisons.values() for row in rows]

    def row(self, comparison: str, case: object, contender: str) -> Row:
        """Raises LookupError if it was not measured."""
        for row in self.comparisons.get(comparison, []):
            if (row["case"], row["contender"]) == (str(case), contender) and row["status"] == "ok":
                return row
        raise LookupError(f"{contender} in {comparison} {case}")


def ratio(comparison: str, case: object, contender: str) -> Callable[[SavedResults], Measured]:
    """A contender's time over this package's."""

    def measure(results: SavedResults) -> Measured:
        row = results.row(comparison, case, contender)
        return Measured(*(float(row[column]) for column in ("ratio_q1", "ratio", "ratio_q3")))

    return measure


def least_ratio(comparison: str, predictions: str, contender: str) -> Callable[[SavedResults], Measured]:
    """The smallest of a contender's ratios, over all numbers of targets up to 200."""
    of_cases = [
        ratio(comparison, replace(case, predictions=predictions), contender)
        for case in cases.ASSIGNMENT
        if case.targets <= 200
    ]
    return lambda results: min((measure(results) for measure in of_cases), key=lambda measured: measured.median)


def memory_ratio(comparison: str, case: object, contender: str) -> Callable[[SavedResults], Measured]:
    def measure(results: SavedResults) -> Measured:
        theirs, ours = (float(results.row(comparison, case, name)["bytes"]) for name in (contender, OURS))
        return Measured(*[theirs / ours] * 3)

    return measure


def price_of_groups(results: SavedResults) -> Measured:
    """What 11 groups cost more than one, in time, over what they cost more in operations."""
    one, many = (results.row("training_step_with_groups", case, OURS) for case in (ONE_GROUP, MANY_GROUPS))
    operations = step_operations(MANY_GROUPS) / step_operations(ONE_GROUP)
    base = float(one["seconds"])
    return Measured(*((float(many[c]) / base - 1) / (operations - 1) for c in ("seconds_q1", "seconds", "seconds_q3")))


ONE_GROUP, MANY_GROUPS = cases.DETECTION[0], cases.DETECTION[-1]
ASSIGNMENT = {case.targets: case for case in cases.ASSIGNMENT}
ATTENTION = cases.ATTENTION[-1]
ENCODER = cases.DEFORMABLE[0]

GOALS = [
    *(
        Goal(f"assignment of 132 problems of 300 x {targets}", peer, limit, ratio("linear_assignment", case, peer))
        for targets, case in ASSIGNMENT.items()
        for peer, limit in (("scipy", {5: 12, 20: 12, 60: 8, 100: 8, 200: 8}.get(targets)), ("lapcpp", 2.5))
        if limit is not None and targets <= 200
    ),
    *(
        Goal(
            f"the same, predictions {predictions}, the least of 5 to 200 targets",
            peer,
            limit,
            least_ratio(f"linear_assignment_{predictions}", predictions, peer),
        )
        for predictions in cases.OTHER_PREDICTIONS
        for peer, limit in (("scipy", 8), ("lapcpp", 2.5))
    ),
    *(
        Goal("attention in 11 groups of 300", peer, limit, ratio("grouped_attention", ATTENTION, peer))
        for peer, limit in (("masked SDPA", 9), ("folded SDPA", 1))
    ),
    *(
        Goal("its memory", peer, 8, memory_ratio("grouped_attention_memory", ATTENTION, peer))
        for peer in ("explicit mask", "masked SDPA")
    ),
    *(
        Goal(f"{work}, 20 objects", peer, limit, ratio(comparison, ASSIGNMENT[20], peer))
        for work, comparison, limits in (
            ("matching", "matching", {"transformers": 15, "rfdetr": 8}),
            ("criterion and backward", "criterion", {"transformers": 8, "rfdetr": 5}),
        )
        for peer, limit in limits.items()
    ),
    *(
        Goal("deformable attention, encoder", peer, limit, ratio("ms_deform_attn", ENCODER, peer))
        for peer, limit in (("grid_sample", 10), ("torch-ms-deform-attn", 3))
    ),
    Goal("Conditional DETR, inference", "transformers", 1.15, ratio("inference", ONE_GROUP, "transformers")),
    Goal("Conditional DETR, training step", "transformers", 1.15, ratio("training_step", ONE_GROUP, "transformers")),
    Goal("11 groups: extra time over extra operations", "one group", 1.15, price_of_groups, at_most=True),
    *(
        Goal("training step with 11 groups", peer, 2, ratio("training_step_with_groups", MANY_GROUPS, peer))
        for peer in ("masked SDPA", "explicit mask")
    ),
]


def goals_table(results: SavedResults) -> str:
    rows = []
    for goal in GOALS:
        try:
            measured = goal.measure(results)
        except LookupError:
            found, verdict = "-", "not measured"
        else:
            found, verdict = spread(measured), goal.verdict(measured)
        sign = "≤" if goal.at_most else "≥"
        rows.append([goal.work, goal.against, f"{sign} {goal.limit:g}", found, verdict])
    return table(["work", "against", "goal", "measured (quartiles)", ""], rows)


def comparison_table(rows: list[Row]) -> str:
    """Times or memory of one comparison, case by case."""
    is_memory = "bytes" in rows[0]
    ours = {row["case"]: row for row in rows if row["contender"] == OURS}
    lines = []
    for row in rows:
        line = [row["case"], row["contender"], row["version"]]
        if row["status"] != "ok":
            lines.append([*line, f"{row['status']}: {row['note']}", ""])
        elif is_memory:
            lines.append(
                [
                    *line,
                    f"{float(row['bytes']) / 1e6:.1f}",
                    significant(float(row["bytes"]) / float(ours[row["case"]]["bytes"])),
                ]
            )
        else:
            seconds = Measured(*(1e3 * float(row[column]) for column in ("seconds_q1", "seconds", "seconds_q3")))
            lines.append([*line, spread(seconds), significant(float(row["ratio"]))])
    unit = "peak memory, MB" if is_memory else "time, ms (quartiles)"
    return table(["case", "contender", "version", unit, f"times {OURS}"], lines)


def machine(rows: list[Row]) -> str:
    """One line on where and how numbers came about."""
    threads, commits = (sorted({row[column] for row in rows}) for column in ("threads", "commit"))
    return (
        f"`{COMMAND}` on {' and '.join(processors(rows))}, {' or '.join(threads)} threads, float32, "
        f"torch {rows[0]['torch']}, commit {', '.join(commits)}."
    )


def processors(rows: Iterable[Row]) -> list[str]:
    return sorted({row["cpu"] for row in rows})


TITLES = {
    "linear_assignment": "Assignment: all problems of a training step, one thread",
    "linear_assignment_random": "The same with random predictions",
    "linear_assignment_early": "The same with predictions of the first steps",
    "linear_assignment_crowded": "The same with predictions around few of many objects",
    "matching": "Matching: cost and assignment, 6 layers, 2 images, 11 groups of 300",
    "criterion": "Criterion with backward, 6 layers, 2 images, 11 groups of 300, 91 classes",
    "grouped_attention": "Decoder self-attention, forward and backward, groups of 300, 2 images",
    "grouped_attention_memory": "Peak memory of decoder self-attention, forward and backward",
    "ms_deform_attn": "Multi-scale deformable attention, forward and backward, 2 images",
    "inference": "Conditional DETR R50, inference, 2 images of 480 x 640",
    "training_step": "Conditional DETR R50, training step, 2 images of 480 x 640",
    "training_step_with_groups": "Conditional DETR R50, training step with K groups",
    "training_step_with_dropout": "Conditional DETR R50, training step with K groups and dropout 0.1",
    "training_step_memory": "Peak memory of a training step with K groups",
    "transformers_step": "Models of transformers, training step with integrations.transformers.accelerate and without",
    "rfdetr_criterion": "RF-DETR Nano, criterion with backward, with integrations.rfdetr.accelerate and without",
    "rfdetr_step": "RF-DETR Nano, training step with integrations.rfdetr.accelerate, one group at a time, and without",
    "rfdetr_step_memory": "Peak memory of a training step of RF-DETR Nano with 13 groups, here one group at a time",
    "ultralytics_criterion": "Ultralytics' RT-DETR-L, criterion with backward, with its accelerate and without",
    "ultralytics_step": "Ultralytics' RT-DETR-L, training step, with its accelerate and without",
    "mask_loss_memory": "Peak memory of Mask2Former's matching and loss, with backward, K groups",
    "mask2former_step_memory": "Peak memory of a training step of Mask2Former R50 with K groups",
}
X_LABELS = {
    "linear_assignment": "objects per image",
    "linear_assignment_random": "objects per image",
    "linear_assignment_early": "objects per image",
    "linear_assignment_crowded": "objects per image",
    "matching": "objects per image",
    "criterion": "objects per image",
    "grouped_attention": "groups K",
    "grouped_attention_memory": "groups K",
    "training_step_with_groups": "groups K",
    "training_step_with_dropout": "groups K",
    "training_step_memory": "groups K",
    "rfdetr_criterion": "images",
    "rfdetr_step": "images",
    "rfdetr_step_memory": "images",
    "ultralytics_criterion": "objects per image",
    "ultralytics_step": "objects per image",
    "mask_loss_memory": "groups K",
    "mask2former_step_memory": "groups K",
}


def goals(results: SavedResults) -> str:
    """What was to be reached and what was, in Markdown."""
    return f"{machine(results.rows)}\n\n{goals_table(results)}"


def report(results: SavedResults, images: str | None = None) -> str:
    """Every comparison in Markdown; ``images`` is where the plots are, as the document sees it, if there are any."""
    parts = [machine(results.rows)]
    mixed = len(processors(results.rows)) > 1
    for name, rows in results.comparisons.items():
        parts.append(f"## {TITLES[name]}")
        if mixed:
            parts.append(f"On {' and '.join(processors(rows))}.")
        parts.append(comparison_table(rows))
        if images is not None:
            parts.append(f"![{TITLES[name]}]({images}bench_{name}.png)")
    return "\n\n".join(parts)


# --- Plots ---


def plot(name: str, rows: list[Row], caption: str, folder: Path) -> None:
    """Lines over the case's size where it has one, else bars."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["status"] == "ok"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if name in X_LABELS:
        draw_lines(axes, rows, X_LABELS[name])
    else:
        draw_bars(axes, rows)
    figure.suptitle(TITLES[name], fontsize=11)
    figure.supxlabel(caption.replace("`", ""), fontsize=7, color="0.35")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"bench_{name}.png", dpi=130)
    plt.close(figure)


def draw_lines(axes, rows, x_label):
    is_memory = "bytes" in rows[0]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == contender]
        x = [float(row["x"]) for row in own]
        style = {"marker": "o", "linewidth": 2.5 if contender == OURS else 1.2, "label": contender}
        if is_memory:
            axes.plot(x, [float(row["bytes"]) / 1e6 for row in own], **style)
        else:
            median, bars = milliseconds(own)
            axes.errorbar(x, median, yerr=bars, capsize=2, **style)
    axes.set_yscale("log")
    axes.set_xticks(sorted({float(row["x"]) for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel("peak memory, MB" if is_memory else "time, ms (median, quartiles)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_bars(axes, rows):
    labels = [
        row["contender"] if len({r["case"] for r in rows}) == 1 else f"{row['contender']}, {row['case']}"
        for row in rows
    ]
    median, bars = milliseconds(rows)
    colors = ["tab:blue" if row["contender"] == OURS else "0.65" for row in rows]
    drawn = axes.barh(labels, median, xerr=bars, color=colors, capsize=2)
    axes.bar_label(drawn, [f" {significant(value)} ms" for value in median], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("time, ms (median, quartiles)")


def milliseconds(rows: list[Row]) -> tuple[list[float], list[list[float]]]:
    """Medians, and their distances from the quartiles."""
    first, median, third = (
        [1e3 * float(row[column]) for row in rows] for column in ("seconds_q1", "seconds", "seconds_q3")
    )
    below = [m - f for m, f in zip(median, first, strict=True)]
    above = [t - m for t, m in zip(third, median, strict=True)]
    return median, [below, above]


def spread(measured: Measured) -> str:
    if measured.first == measured.third:
        return significant(measured.median)
    return f"{significant(measured.median)} ({significant(measured.first)}-{significant(measured.third)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of csv files")
    parser.add_argument(
        "--write", action="store_true", help=f"update {PERFORMANCE.name}, {ON_CPUS.name} and its images"
    )
    arguments = parser.parse_args()
    results = SavedResults(arguments.results)
    if not results.comparisons:
        parser.error(f"there are no results in {arguments.results}: run {COMMAND}")
    if not arguments.write:
        print(goals(results), report(results), sep="\n\n")
        return
    for name, rows in results.comparisons.items():
        plot(name, rows, machine(rows), IMAGES)
    write_section(PERFORMANCE, GOALS_SECTION, goals(results))
    write_section(ON_CPUS, SECTION, report(results, images="images/"))
    print(goals(results))
