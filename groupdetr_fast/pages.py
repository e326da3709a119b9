"""Tables for readers, and pages of html that need nothing but themselves."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["embedded_picture", "html_page", "html_table", "markdown_table"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: white; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: 0.2rem 0.7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #8882; padding: 0.5rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } a { color: #8bf; } }
"""


def html_page(title: str, body: str) -> str:
    """A page with a title, given its html below that."""
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def embedded_picture(path: Path, alternative: str) -> str:
    """A png or jpeg inside the page, with a text for those who do not see it."""
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:image/{kind};base64,{content}" alt="{html.escape(alternative)}">'


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with equal keys; empty without rows. See :func:`markdown_table`."""
    if not rows:
        return ""
    head, *body = _cells(rows)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Lines of a table of rows with equal keys, which are its heads; ``x`` and ``x_std`` share a column."""
    if not rows:
        return
    head, *body = _cells(rows)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield "| " + " | ".join(row) + " |"


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows as text."""
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
