"""The launchers and Triton kernels of the ops, run on the CPU by Triton's interpreter."""

from pathlib import Path

import pytest
from triton_interpreter import run_interpreted

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_interpreted(file):
    run_interpreted(file, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cross_attention", "grouped_attention"])
def test_interpreted_at_length(op):
    run_interpreted(Path(__file__).with_name(f"interpreted_{op}.py"), "-m", "slow")
