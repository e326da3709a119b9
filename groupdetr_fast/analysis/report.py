"""The files of a measurement, and a page that shows all of them."""

import csv
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import read_json, write_json
from .plots import save_figure

__all__ = ["Measurement", "write_measurement", "write_page"]

PAGE = "index.html"
ORDER = ("assignment", "sweep_groups", "ablation", "cost", "reference_points", "distances", "group_ap")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: white; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: 0.2rem 0.7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #8882; padding: 0.5rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } a { color: #8bf; } }
"""


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
    """

    name: str
    title: str
    caption: str
    command: str
    rows: Sequence[Mapping[str, Any]]
    summary: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


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
    for line in _text_table(measurement.summary):
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
    page.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Group DETR: measurements</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Group DETR: measurements</h1>\n{sections}\n</body>\n</html>\n"
    )
    return page


def _section(measurement: Measurement) -> str:
    name = measurement.name
    parts = [
        f'<h2 id="{name}">{html.escape(measurement.title)}</h2>',
        f'<img src="{name}.png" alt="{html.escape(measurement.title)}">',
        f"<p>{html.escape(measurement.caption)}</p>",
        f"<pre>{html.escape(measurement.command)}</pre>",
        _html_table(measurement.summary),
        f'<p>All {len(measurement.rows)} results: <a href="{name}.csv">{name}.csv</a>, '
        f'<a href="{name}.json">{name}.json</a></p>',
        "<details><summary>Settings of the training</summary>"
        f"<pre>{html.escape(json.dumps(measurement.settings, indent=1))}</pre></details>",
    ]
    return "\n".join(parts)


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    head, *body = _cells(rows)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _text_table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Lines of a Markdown table."""
    if not rows:
        return
    head, *body = _cells(rows)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield "| " + " | ".join(row) + " |"


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows as text; a value and its ``_std`` share a column."""
    columns = [name for name in rows[0] if not name.endswith("_std")]
    table = [[name.replace("_", " ") for name in columns]]
    for row in rows:
        table.append([_number(row[name]) + _spread(row.get(f"{name}_std")) for name in columns])
    return table


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {_number(value)}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
