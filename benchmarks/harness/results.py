"""Rows of results and their files."""

import csv
import functools
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import peers
from .commits import commit
from .interleave import Timing, quartiles
from .memory import Peak

__all__ = ["OURS", "ResultWriter", "processor"]

OURS = "groupdetr_fast"  # the name of this package among the contenders


class ResultWriter:
    """The rows of one session, written to one csv file per comparison.

    Times are seconds, ``ratio`` is a contender's time over this package's in the same round, and memory is bytes. Each
    has the median and both quartiles over rounds.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def add_timings(self, comparison: str, case: Any, x: float, timings: Mapping[str, Timing]) -> None:
        ours = timings[OURS].seconds
        for contender, timing in timings.items():
            row = self._row(comparison, case, x, contender, timing.status, timing.note)
            if timing.seconds:
                row.update(rounds=len(timing.seconds), calls=timing.calls)
                row.update(_spread("seconds", timing.seconds))
                if ours:
                    row.update(
                        _spread("ratio", [theirs / own for theirs, own in zip(timing.seconds, ours, strict=True)])
                    )
        self._rows[comparison].sort(key=lambda row: row["x"])

    def add_memory(self, comparison: str, case: Any, x: float, contender: str, peak: Peak) -> None:
        self._row(comparison, case, x, contender, peak.status, peak.note)["bytes"] = peak.bytes

    def _row(self, comparison: str, case: Any, x: float, contender: str, status: str, note: str) -> dict[str, Any]:
        row = {
            "comparison": comparison,
            "case": str(case),
            "x": x,
            "contender": contender,
            "status": status,
            "note": note,
            "version": _version(contender),
            "threads": torch.get_num_threads(),
            "cpu": processor(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        self._rows.setdefault(comparison, []).append(row)
        return row

    def write(self) -> None:
        for comparison, rows in self._rows.items():
            self._folder.mkdir(parents=True, exist_ok=True)
            columns = list(dict.fromkeys(column for row in rows for column in row))
            with (self._folder / f"{comparison}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)

    def report(self) -> list[str]:
        """Lines that say where the results are, and who was not timed."""
        lines = [f"results: {self._folder / name}.csv" for name in self._rows]
        bad = [row for rows in self._rows.values() for row in rows if row["status"] != "ok"]
        return lines + [f"{row['comparison']} {row['case']}: {row['contender']} is {row['status']}" for row in bad]


def _spread(name: str, values: list[float]) -> dict[str, str]:
    first, median, third = quartiles(values)
    return {f"{name}_q1": f"{first:.6g}", name: f"{median:.6g}", f"{name}_q3": f"{third:.6g}"}


def _version(contender: str) -> str:
    """Of the contender's distribution; of torch for what is made of torch alone."""
    name, _, _ = contender.partition(",")
    for found in importlib.metadata.distributions(name=name, path=[str(peers.FOLDER)]):
        return found.version
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"torch {torch.__version__}"


@functools.cache
def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
