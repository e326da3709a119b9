"""The tests of Ultralytics' RT-DETR, each file in a process of its own.

When it is imported, Ultralytics exchanges ``torch.save`` and ``PIL.Image.open``, and sets how arrays are printed and
``OMP_NUM_THREADS``; the tests after it would meet that.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("ultralytics_*.py"))


@pytest.mark.skipif(find_spec("ultralytics") is None, reason="ultralytics is not installed")
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_in_a_process_of_its_own(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # for tiny models, which more threads slow down
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
