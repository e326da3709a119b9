"""Where things are in the repository."""

import os
from pathlib import Path

__all__ = ["DOCS", "RESULTS", "ROOT", "python_path"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"


def python_path(*folders: Path) -> str:
    """``PYTHONPATH`` of a process of its own that imports from these folders before those of this process."""
    return os.pathsep.join(filter(None, (*map(str, folders), os.environ.get("PYTHONPATH"))))
