"""The files of a measurement, and a page that shows all of them."""

import csv
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import read_json, write_json
from ..pages import html_page, html_table, markdown_table
from .plots import save_figure

__all__ = ["Measurement", "write_measurement", "write_page"]

PAGE = "index.html"
DIFFERENCES = "Differences to the runs with one group, paired by seed; their mean lies between from and to at 95 %."
ORDER = (
    "assignment",
    "sweep_groups",
    "ablation",
    "cost",
    "reference_points",
    "distances",
    "group_ap",
    "agreement",
    "spread",
)


@dataclass(frozen=True)
class Measurement:
    """What a measurement has found.

    Attributes:
        name: of its files.
        title: one line.
        caption: what is shown, in which units, from which runs.
        command: the command line that made it.
        rows: all results, one for each run, step or query; the csv file.
        summary: the table for readers, averaged over seeds.
        settings: of the training that the runs vary.
        differences: of the runs to those with one group; see ``experiments.paired_differences``.
    """

    name: str
    title: str
    caption: str
    command: str
    rows: Sequence[Mapping[str, Any]]
    summary: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    differences: Sequence[Mapping[str, Any]] = ()


def write_measurement(measurement: Measurement, figure: Figure, folder: Path) -> None:
    """Write ``<name>.json``, ``<name>.csv`` and ``<name>.png``, and the page anew; print the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    name = measurement.name
    write_json(folder / f"{name}.json", asdict(measurement))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(measurement.rows[0]))
        writer.writeheader()
        writer.writerows(measurement.rows)
    save_figure(figure, folder / f"{name}.png", f"{measurement.caption} Command: {measurement.command}")
    write_page(folder)
    print(measurement.title)
    for line in markdown_table(measurement.summary):
        print(line)
    if measurement.differences:
        print(DIFFERENCES)
    for line in markdown_table(measurement.differences):
        print(line)
    print(f"files: {folder / name}.png, .csv, .json; page: {folder / PAGE}")


def write_page(folder: Path) -> Path:
    """Write ``index.html``, which shows every measurement whose files are in ``folder``.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = [content for name in ORDER if (content := read_json(folder / f"{name}.json")) is not None]
    if not found:
        raise FileNotFoundError(f"there is no measurement in {folder}: run another analyze command first")
    sections = "\n".join(_section(Measurement(**content)) for content in found)
    page = folder / PAGE
    page.write_text(html_page("Group DETR: measurements", sections))
    return page


def _section(measurement: Measurement) -> str:
    name = measurement.name
    parts = [
        f'<h2 id="{name}">{html.escape(measurement.title)}</h2>',
        f'<img src="{name}.png" alt="{html.escape(measurement.title)}">',
        f"<p>{html.escape(measurement.caption)}</p>",
        f"<pre>{html.escape(measurement.command)}</pre>",
        html_table(measurement.summary),
        *([f"<p>{DIFFERENCES}</p>", html_table(measurement.differences)] if measurement.differences else []),
        f'<p>All {len(measurement.rows)} results: <a href="{name}.csv">{name}.csv</a>, '
        f'<a href="{name}.json">{name}.json</a></p>',
        "<details><summary>Settings of the training</summary>"
        f"<pre>{html.escape(json.dumps(measurement.settings, indent=1))}</pre></details>",
    ]
    return "\n".join(parts)
