"""Compare finished runs: a table, a plot of AP against epochs or minutes, and every number as a csv file.

    python examples/compare_runs.py runs/k1 runs/k5 --plot curves.png --every 10

    python examples/compare_runs.py runs/k1 runs/k3 runs/near --labels K=1 K=3 "K=3, near group 0" \
        --metrics AP AP50 loss --against minutes --plot curves.png --csv curves.csv

Reads each run's ``results.json``.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass
class Arguments:
    """Which runs, and how to show them."""

    runs: tyro.conf.Positional[list[Path]]
    """Folders of runs."""
    labels: tuple[str, ...] = ()
    """Names of the runs, one each; K=... by default."""
    plot: Path | None = None
    """Picture to write."""
    csv: Path | None = None
    """File of all numbers to write, with a row for each epoch of each run."""
    metrics: tuple[str, ...] = ("AP", "AP50")
    """What to show: metrics of the evaluation, losses of the training (loss, loss_ce, ...), or gradient_norm."""
    against: Literal["epoch", "minutes"] = "epoch"
    """What the plot's horizontal axis is: minutes are those of training, without evaluations."""
    every: int = 1
    """Show every so many epochs in the table; the last of each run is always shown."""

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != len(self.runs):
            raise SystemExit(f"error: {len(self.labels)} labels for {len(self.runs)} runs: give one for each")


def read_run(folder: Path, label: str | None) -> tuple[str, list[dict]]:
    """A label and a row of numbers for each epoch; those that were evaluated have metrics."""
    results = json.loads((folder / "results.json").read_text())
    rows, seconds = [], 0.0
    for row in results["epochs"]:
        seconds += row["seconds"]
        numbers = {name: value for name, value in row.items() if name not in ("train", "metrics")}
        metrics = {name: value for name, value in row.get("metrics", {}).items() if isinstance(value, float)}
        rows.append({**numbers, "minutes": seconds / 60, **row.get("train", {}), **metrics})
    return label or f"K={results['model_config']['num_groups']}", rows


def print_table(runs: list[tuple[str, list[dict]]], arguments: Arguments) -> None:
    header = [f"{label} {metric}" for metric in arguments.metrics for label, _ in runs]
    print("| epoch | " + " | ".join(header) + " |")
    print("|---" * (len(header) + 1) + "|")
    by_epoch = [{row["epoch"]: row for row in rows if "AP" in row} for _, rows in runs]
    for epoch in sorted(set().union(*by_epoch)):
        if epoch % arguments.every == 0 or any(epoch == max(rows) for rows in by_epoch if rows):
            values = [rows.get(epoch, {}).get(metric) for metric in arguments.metrics for rows in by_epoch]
            print(f"| {epoch} | " + " | ".join("" if value is None else f"{value:.3f}" for value in values) + " |")
    for label, rows in runs:
        memory = max(row["peak_memory_mib"] for row in rows)
        print(f"\n{label}: {rows[-1]['minutes']:.1f} minutes of training, peak memory {memory:.0f} MiB", end="")
    print()


def draw(runs: list[tuple[str, list[dict]]], arguments: Arguments) -> None:
    figure = Figure(figsize=(4.2 * len(arguments.metrics), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, metric in zip(
        figure.subplots(1, len(arguments.metrics), squeeze=False)[0], arguments.metrics, strict=True
    ):
        for label, all_rows in runs:
            rows = [row for row in all_rows if metric in row]
            axis.plot([row[arguments.against] for row in rows], [row[metric] for row in rows], label=label)
        axis.set(xlabel=arguments.against, ylabel=metric, ylim=None if "loss" in metric else (0, None))
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(arguments.plot, dpi=120)


def write_csv(runs: list[tuple[str, list[dict]]], path: Path) -> None:
    columns = list(dict.fromkeys(name for _, rows in runs for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *columns], lineterminator="\n")
        writer.writeheader()
        for label, rows in runs:
            for row in rows:
                rounded = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
                writer.writerow({"run": label, **rounded})


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    labels = arguments.labels or [None] * len(arguments.runs)
    runs = [read_run(folder, label) for folder, label in zip(arguments.runs, labels, strict=True)]
    print_table(runs, arguments)
    if arguments.plot is not None:
        draw(runs, arguments)
    if arguments.csv is not None:
        write_csv(runs, arguments.csv)


if __name__ == "__main__":
    main()
