"""The figures of the measurements. matplotlib's global backend and figures are not touched."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "draw_ablation",
    "draw_agreement",
    "draw_assignment",
    "draw_cost",
    "draw_distances",
    "draw_group_ap",
    "draw_reference_points",
    "draw_spread",
    "draw_sweep",
    "save_figure",
]

Rows = Sequence[Mapping[str, Any]]

CAPTION_SIZE = 6.5  # points
CHARACTERS_PER_INCH = 19  # at that size
DPI = 140

# The lines of figure 1: (assignment, way to use the queries, label)
_ASSIGNMENT_LINES = (
    ("one_to_one", "all_queries", "one-to-one"),
    ("one_to_many", "all_queries_nms", "one-to-many, with NMS"),
    ("one_to_many", "all_queries", "one-to-many, without NMS"),
    ("group", "one_group", "group-wise one-to-many, one group"),
)
_USAGES = (
    ("one_group", "one group"),
    ("all_queries", "all queries"),
    ("all_queries_nms", "all queries, with NMS"),
)


def save_figure(figure: Figure, path: Path, caption: str) -> None:
    """Write a figure with its caption below."""
    width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    figure.supxlabel(textwrap.fill(caption, width), fontsize=CAPTION_SIZE, x=0.01, ha="left")
    figure.savefig(path)


def draw_assignment(averages: Rows) -> Figure:
    """Figure 1: AP against the number of queries.

    Args:
        averages: with ``assignment``, ``queries``, and ``AP_<usage>`` with its ``_std``.
    """
    figure, (axis,) = _figure(1, width=5.5)
    for assignment, usage, label in _ASSIGNMENT_LINES:
        rows = [row for row in averages if row["assignment"] == assignment]
        _errorbars(axis, rows, "queries", f"AP_{usage}", label)
    axis.set(xlabel="object queries in training", ylabel="AP")
    _start_at_zero(axis)
    axis.legend(fontsize=8)
    return figure


def draw_sweep(averages: Rows, curves: Rows, epochs: int) -> Figure:
    """Tables 1 and 2: AP against the number of groups, the epoch, and the time.

    Args:
        averages: with ``num_groups``, ``epochs``, ``AP_one_group`` and ``minutes``, each with its ``_std``.
        curves: with ``num_groups``, ``epochs`` (of the run), ``epoch`` and ``AP``.
        epochs: those of the runs that are compared at equal epochs.
    """
    figure, (by_groups, by_epoch, by_time) = _figure(3, width=4)
    equal = [row for row in averages if row["epochs"] == epochs]
    _errorbars(by_groups, equal, "num_groups", "AP_one_group", None)
    by_groups.set(xlabel="groups K", ylabel=f"AP after {epochs} epochs", xticks=[row["num_groups"] for row in equal])
    colour = _colours(sorted({row["num_groups"] for row in averages}))
    for row in averages:
        number, own_epochs = row["num_groups"], row["epochs"]
        label, style, marker = f"K={number}", "-", "o"
        if own_epochs != epochs:
            label, style, marker = f"{label}, {own_epochs} epochs", "--", "s"
        shared = {"color": colour(number), "label": label}
        points = [point for point in curves if (point["num_groups"], point["epochs"]) == (number, own_epochs)]
        by_epoch.plot([point["epoch"] for point in points], [point["AP"] for point in points], style, **shared)
        spread = {"xerr": row["minutes_std"], "yerr": row["AP_one_group_std"], "capsize": 2}
        by_time.errorbar(row["minutes"], row["AP_one_group"], marker=marker, **spread, **shared)
    by_epoch.set(xlabel="epoch", ylabel="AP")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    _start_at_zero(by_epoch)
    by_time.set(xlabel="minutes of training steps", ylabel="AP at the end")
    for axis in (by_epoch, by_time):
        axis.legend(fontsize=7)
    return figure


def draw_ablation(averages: Rows) -> Figure:
    """Table 7 as bars: AP of each variant under each way to use its queries."""
    figure, (axis,) = _figure(1, width=8)
    width = 0.8 / len(_USAGES)
    for index, (usage, label) in enumerate(_USAGES):
        places = [place + (index - (len(_USAGES) - 1) / 2) * width for place in range(len(averages))]
        heights = [row[f"AP_{usage}"] for row in averages]
        errors = [row[f"AP_{usage}_std"] or 0 for row in averages]
        axis.bar(places, heights, width * 0.95, yerr=errors, label=label, capsize=2)
    names = [textwrap.fill(row["variant"], 16) for row in averages]
    axis.set_xticks(range(len(averages)), names, fontsize=8)
    axis.set(ylabel="AP")
    axis.legend(fontsize=8, ncols=len(_USAGES), loc="lower left", bbox_to_anchor=(0, 1), title="used in inference")
    return figure


def draw_cost(rows: Rows) -> Figure:
    """Time and memory of a training step against the number of groups."""
    figure, (time, memory) = _figure(2, width=4)
    groups = [row["num_groups"] for row in rows]
    seconds = [row["seconds_per_step"] for row in rows]
    below = [row["seconds_per_step"] - row["seconds_per_step_p20"] for row in rows]
    above = [row["seconds_per_step_p80"] - row["seconds_per_step"] for row in rows]
    time.errorbar(groups, seconds, yerr=(below, above), marker="o", capsize=3)
    time.set(xlabel="groups K", ylabel="seconds per step")
    memory.plot(groups, [row["peak_memory_mib"] for row in rows], marker="o")
    memory.set(xlabel="groups K", ylabel="peak memory [MiB]")
    for axis in (time, memory):
        _start_at_zero(axis)
        axis.set_xticks(groups)
    return figure


def draw_reference_points(rows: Rows) -> Figure:
    """Figure 3: where the queries of each group look first.

    Args:
        rows: with ``group``, and ``x`` and ``y`` relative to the image.
    """
    figure, (axis,) = _figure(1, width=5.5, height=5)
    groups = sorted({row["group"] for row in rows})
    colour = _colours(groups)
    for group in groups:
        points = [row for row in rows if row["group"] == group]
        axis.scatter(
            [row["x"] for row in points],
            [row["y"] for row in points],
            s=14,
            color=colour(group),
            label=f"group {group}",
        )
    axis.set(xlabel="x / image width", ylabel="y / image height", xlim=(0, 1), ylim=(1, 0), aspect="equal")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_distances(rows: Rows) -> Figure:
    """Figure 4: both distances against the training step; thin lines are single seeds.

    Args:
        rows: with ``seed``, ``step``, ``perturbation_distance`` and ``matching_distance``.
    """
    figure, (axis,) = _figure(1, width=5.5)
    seeds = sorted({row["seed"] for row in rows})
    for index, (name, label) in enumerate((("matching_distance", "MD"), ("perturbation_distance", "PD"))):
        for seed in seeds:
            own = [row for row in rows if row["seed"] == seed]
            axis.plot([row["step"] for row in own], [row[name] for row in own], color=f"C{index}", lw=0.6, alpha=0.5)
        _mean_line(axis, rows, name, label, f"C{index}")
    axis.set(xlabel="training step", ylabel="distance relative to the image")
    _start_at_zero(axis)
    axis.legend(fontsize=8)
    return figure


def draw_agreement(rows: Rows) -> Figure:
    """The cosine between the groups' gradients against the training step.

    Args:
        rows: with ``step``, ``decoder`` and ``memory``.
    """
    figure, (axis,) = _figure(1, width=5.5)
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["decoder"] for row in rows], marker=".", label="the decoder's shared parameters")
    axis.plot(steps, [row["memory"] for row in rows], marker=".", label="what the encoder receives")
    axis.set(xlabel="training step", ylabel="cosine between two groups' gradients")
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_ylim(top=1.05)
    axis.legend(fontsize=8)
    return figure


def draw_spread(rows: Rows) -> Figure:
    """The spread of contents and of boxes, and the loss, against the training step.

    Args:
        rows: with ``step`` and what ``spread.spread_of_queries`` returns.
    """
    figure, (contents, boxes, loss) = _figure(3, width=4)
    steps = [row["step"] for row in rows]
    for axis, name, label in (
        (contents, "content_first", "over queries, first layer"),
        (contents, "content_last", "over queries, last layer"),
        (contents, "content_images", "over images, last layer"),
        (contents, "memory_images", "over images, encoder"),
        (boxes, "box_queries", "over queries"),
        (boxes, "box_images", "over images"),
        (loss, "loss", None),
    ):
        axis.plot(steps, [row[name] for row in rows], marker=".", label=label)
    for axis, words in ((contents, "spread of contents"), (boxes, "spread of boxes"), (loss, "loss")):
        axis.set(xlabel="training step", ylabel=words)
        _start_at_zero(axis)
    contents.legend(fontsize=8)
    boxes.legend(fontsize=8)
    return figure


def draw_group_ap(rows: Rows) -> Figure:
    """AP of each group used alone; a line for each model.

    Args:
        rows: with ``model``, ``group`` and ``AP``.
    """
    figure, (axis,) = _figure(1, width=5.5)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        axis.plot([row["group"] for row in own], [row["AP"] for row in own], "o-", label=model)
    axis.set(xlabel="group used in inference", ylabel="AP")
    _start_at_zero(axis)
    axis.set_xticks(sorted({row["group"] for row in rows}))
    axis.legend(fontsize=8)
    return figure


def _figure(panels: int, *, width: float, height: float = 3.8) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * panels, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _errorbars(axis: Axes, rows: Rows, x: str, y: str, label: str | None) -> None:
    errors = [row[f"{y}_std"] or 0 for row in rows]
    axis.errorbar([row[x] for row in rows], [row[y] for row in rows], yerr=errors, marker="o", capsize=3, label=label)


def _start_at_zero(axis: Axes) -> None:
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])


def _mean_line(axis: Axes, rows: Rows, name: str, label: str, colour: str) -> None:
    """Mean over seeds at the steps that all of them have reached."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row[name])
    complete = max(len(values) for values in by_step.values())
    steps = sorted(step for step, values in by_step.items() if len(values) == complete)
    axis.plot(steps, [sum(by_step[step]) / complete for step in steps], color=colour, label=label)


def _colours(values: Sequence[int]) -> Callable[[int], Any]:
    palette = colormaps["tab20" if len(values) > 10 else "tab10"]
    places = {value: index for index, value in enumerate(values)}
    return lambda value: palette(places[value] % palette.N)
