"""Documents that scripts write: sections between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, and tables."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from .places import DOCS

__all__ = [
    "GPU_KERNELS",
    "ON_A_GPU",
    "ON_CPUS",
    "PERFORMANCE",
    "read_section",
    "section_command",
    "significant",
    "table",
    "write_section",
]

PERFORMANCE = DOCS / "performance.md"  # goals, and what the numbers say
ON_CPUS = DOCS / "performance_on_cpus.md"
ON_A_GPU = DOCS / "performance_on_a_gpu.md"
GPU_KERNELS = DOCS / "gpu_kernels.md"


def read_section(document: Path, name: str) -> str:
    """The text of a section.

    Raises:
        ValueError: if the document does not have it.
    """
    return _split(document, name)[1]


def write_section(document: Path, name: str, text: str) -> None:
    """Replace the text of a section; the rest of the document stays as it is."""
    before, _, after = _split(document, name)
    document.write_text(f"{before}{text.strip()}{after}")


def section_command(description: str, document: Path, name: str, text: Callable[[], str]) -> None:
    """The command line of a script that computes a section: print it, ``--write`` or ``--check`` it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help=f"put the tables into {document.name}")
    action.add_argument("--check", action="store_true", help=f"fail if {document.name} has other tables")
    arguments = parser.parse_args()
    if arguments.write:
        write_section(document, name, text())
    elif arguments.check:
        if read_section(document, name) != text():
            sys.exit(f"{document} has other tables: run python {sys.argv[0]} --write")
    else:
        print(text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def significant(value: float) -> str:
    """A number with three digits."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def _split(document: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->\n\n", f"\n\n<!-- {name}:end -->"
    text = document.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{document} must have one section {name}")
    before, _, rest = text.partition(begin)
    section, _, after = rest.partition(end)
    return before + begin, section, end + after
