"""The tests of on_idle_gpu.py, in a process of their own: the driver that does nothing stays loaded until it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("on_idle_gpu.py")


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_op_host(kind):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", kind, str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
