import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

CHECKOUTS = "GROUPDETR_FAST_ORIGINALS"


@pytest.fixture
def checkout():
    """A function from the name of an author's repository to a checkout of it; skips the test where there is none."""

    def find(name):
        if CHECKOUTS not in os.environ:
            pytest.skip(f"{CHECKOUTS} names no folder with checkouts of the originals (see benchmarks/README.md)")
        folder = Path(os.environ[CHECKOUTS]) / name
        if not folder.is_dir():
            pytest.skip(f"there is no checkout {folder}")
        return folder

    return find
