"""Where things are in the repository."""

from pathlib import Path

__all__ = ["DOCS", "RESULTS", "ROOT"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
