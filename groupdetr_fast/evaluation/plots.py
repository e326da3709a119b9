"""Pictures of what detections get wrong, and of how a training went. matplotlib's global state is not touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .diagnosis import ClassDiagnosis, Diagnosis
from .fonts import written

__all__ = ["draw_confusion", "draw_curves", "draw_errors", "draw_precision_recall", "draw_rates"]

DPI = 120
MOST_CURVES = 12  # with their names; more cannot be told apart
MOST_CLASSES = 20  # in a confusion matrix, so that its names can be read
LONGEST_NAME = 20  # characters


def draw_precision_recall(classes: Sequence[ClassDiagnosis], path: Path) -> None:
    """Precision against recall at IoU 0.5: of the classes with the most objects, with their best thresholds."""
    axis = _axis(6.5, 4.5)
    chosen = sorted((each for each in classes if each.objects), key=lambda each: -each.objects)[:MOST_CURVES]
    for each in chosen:
        (line,) = axis.plot(each.recalls, each.precisions, label=str(each.objects))
        if each.threshold is not None:
            precision, recall, _ = each.at_threshold
            axis.plot([recall], [precision], "o", color=line.get_color())
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    if chosen:
        legend = axis.legend(fontsize=7, loc="lower left", title="class (objects); dot: best F1", title_fontsize=7)
        # Names are set afterwards: labels that begin with _ are left out.
        for each, text in zip(chosen, legend.get_texts(), strict=True):
            text.set(**written(f"{_short(each.name)} ({each.objects})"))
    _save(axis, path)


def draw_confusion(diagnosis: Diagnosis, path: Path) -> None:
    """The confusion matrix, of the classes with the most objects if there are many; each row's shares as colours."""
    numbers = diagnosis.confusion[:-1].sum(1)
    chosen = np.sort(np.argsort(-numbers, kind="stable")[:MOST_CLASSES])
    rows = np.append(chosen, len(numbers))
    counts = diagnosis.confusion[np.ix_(rows, rows)]
    names = [written(_short(diagnosis.classes[index].name)) for index in chosen]
    side = 2.5 + 0.35 * len(rows)
    axis = _axis(side, side)
    axis.grid(False)
    axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    places = range(len(rows))
    axis.set_xticks(places, [*(name["text"] for name in names), "missed"], rotation=90, fontsize=7)
    axis.set_yticks(places, [*(name["text"] for name in names), "no object"], fontsize=7)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        for label, name in zip(labels, names, strict=False):  # not the last one, which is no name
            label.set(**name)
    axis.set(xlabel="detected as", ylabel="is")
    for row, column in np.argwhere(counts):
        share = counts[row, column] / counts[row].sum()
        colour = "white" if share > 0.5 else "black"
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=6, color=colour)
    _save(axis, path)


def draw_errors(diagnosis: Diagnosis, path: Path) -> None:
    """How many errors there are of each kind."""
    axis = _axis(6.5, 2.6)
    bars = axis.barh(list(diagnosis.errors), list(diagnosis.errors.values()), color="tab:red")
    axis.bar_label(bars, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set(xlabel=f"detections, or objects that are missed ({diagnosis.correct} detections are right)")
    _save(axis, path)


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The training loss and AP by epoch.

    Args:
        history: the ``epochs`` of ``results.json``.
    """
    figure = Figure(figsize=(9, 3.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    trained = [row for row in history if "loss" in row.get("train", {})]
    left.plot([row["epoch"] for row in trained], [row["train"]["loss"] for row in trained])
    left.set(xlabel="epoch", ylabel="training loss")
    evaluated = [row for row in history if "metrics" in row]
    for name in ("AP", "AP50", "AP75"):
        right.plot(
            [row["epoch"] for row in evaluated], [row["metrics"][name] for row in evaluated], marker=".", label=name
        )
    right.set(xlabel="epoch", ylabel="AP", ylim=(0, None))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)


def draw_rates(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marked: Mapping[str, float], path: Path
) -> None:
    """The loss of each step of a sweep of the learning rate, and its moving average, against the rate.

    Args:
        rates, losses, smoothed: of the steps.
        marked: rates to mark, by what they are called.
        path: of the picture.
    """
    axis = _axis(6.5, 4.0)
    axis.plot(rates, losses, color="lightgrey", label="loss")
    axis.plot(rates, smoothed, label="smoothed")
    for (name, rate), colour in zip(marked.items(), ("tab:green", "tab:orange"), strict=False):
        axis.axvline(rate, linestyle="--", color=colour, label=f"{name} {rate:.2g}")
    low, high = min(losses), max(smoothed)
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - 0.1 * (high - low), high * 1.05))
    axis.legend(fontsize=7)
    _save(axis, path)


def _axis(width: float, height: float) -> Axes:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    return axis


def _save(axis: Axes, path: Path) -> None:
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    figure.savefig(path)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
