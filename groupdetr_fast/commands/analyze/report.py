"""The command ``groupdetr analyze report``."""

from dataclasses import dataclass
from pathlib import Path

from ...analysis.report import write_page
from .common import Analysis

__all__ = ["ReportCommand"]


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write the page that shows every measurement in the folder; the other commands do so too.

    Attributes:
        output: folder of the results.
    """

    output: Path = Analysis.output

    def __call__(self) -> None:
        print(write_page(self.output))
