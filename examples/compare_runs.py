"""Compare finished runs: a table and a plot of AP against epochs.

    python examples/compare_runs.py runs/k1 runs/k5 --plot curves.png --every 10

Reads each run's ``results.json``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass
class Arguments:
    """Which runs, and how to show them."""

    runs: tyro.conf.Positional[list[Path]]
    """Folders of runs."""
    plot: Path | None = None
    """Picture to write."""
    metrics: tuple[str, ...] = ("AP", "AP50")
    """Metrics to show."""
    every: int = 1
    """Show every so many epochs in the table; the last is always shown."""


def label_of(results: dict) -> str:
    return f"K={results['model_config']['num_groups']}"


def print_table(runs: list[dict], arguments: Arguments) -> None:
    header = [f"{label_of(run)} {metric}" for metric in arguments.metrics for run in runs]
    print("| epoch | " + " | ".join(header) + " |")
    print("|---" * (len(header) + 1) + "|")
    by_epoch = [{row["epoch"]: row["metrics"] for row in run["epochs"] if "metrics" in row} for run in runs]
    epochs = sorted(set.intersection(*(set(rows) for rows in by_epoch)))
    for epoch in epochs:
        if epoch % arguments.every == 0 or epoch == epochs[-1]:
            cells = [f"{rows[epoch][metric]:.3f}" for metric in arguments.metrics for rows in by_epoch]
            print(f"| {epoch} | " + " | ".join(cells) + " |")
    for run in runs:
        seconds = sum(row["seconds"] for row in run["epochs"])
        memory = max(row["peak_memory_mib"] for row in run["epochs"])
        print(f"\n{label_of(run)}: {seconds / 60:.1f} minutes of training, peak memory {memory:.0f} MiB", end="")
    print()


def draw(runs: list[dict], arguments: Arguments) -> None:
    figure = Figure(figsize=(4.2 * len(arguments.metrics), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, metric in zip(
        figure.subplots(1, len(arguments.metrics), squeeze=False)[0], arguments.metrics, strict=True
    ):
        for run in runs:
            rows = [row for row in run["epochs"] if "metrics" in row]
            axis.plot([row["epoch"] for row in rows], [row["metrics"][metric] for row in rows], label=label_of(run))
        axis.set(xlabel="epoch", ylabel=metric, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(arguments.plot, dpi=120)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    runs = [json.loads((run / "results.json").read_text()) for run in arguments.runs]
    print_table(runs, arguments)
    if arguments.plot is not None:
        draw(runs, arguments)


if __name__ == "__main__":
    main()
