"""Runs a file of tests under Triton's interpreter, which executes kernels on the CPU, one program after another."""

import os
import subprocess
import sys

import pytest


def run_interpreted(file, *arguments):
    """Run the tests of ``file`` in a process of its own; fail if one of them fails, skip without Triton.

    Triton reads ``TRITON_INTERPRET`` when it is imported and when a kernel is defined, which may have happened here
    already. Tests call the launchers of kernels, as the dispatcher has other kernels for CPU tensors. The interpreter
    computes ``tl.dot`` of bfloat16 wrongly; use float32 and float16 there.

    Args:
        file: a Python file whose name pytest does not collect by itself (``interpreted_*.py``).
        arguments: more arguments of pytest.
    """
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
