"""What setup.py decides to build, and that a wheel made from the repository works without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_setup(**environment):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"GROUPDETR_FAST_BUILD": "python"},
            "groupdetr_fast: building no kernels (PyTorch references) (GROUPDETR_FAST_BUILD=python)",
        ),
        (
            {"GROUPDETR_FAST_BUILD": "cpu", "CXX": sys.executable},
            "groupdetr_fast: building CPU kernels (GROUPDETR_FAST_BUILD=cpu)",
        ),
        (
            {"CXX": sys.executable, "CUDA_HOME": "/nonexistent"},
            "groupdetr_fast: building CPU kernels (no usable CUDA toolkit)",
        ),
        (
            {"CXX": "/nonexistent/c++", "CUDA_HOME": "/nonexistent", "PATH": "/nonexistent"},
            "groupdetr_fast: building no kernels (PyTorch references) (no C++ compiler found)",
        ),
    ],
)
def test_decision_is_one_line(environment, line):
    done = run_setup(**environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == line


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"GROUPDETR_FAST_BUILD": "gpu"},
            "GROUPDETR_FAST_BUILD must be one of auto, cpu, cuda, python; got 'gpu'",
        ),
        ({"GROUPDETR_FAST_BUILD": "cuda", "CUDA_HOME": "/nonexistent"}, "GROUPDETR_FAST_BUILD=cuda needs a"),
    ],
)
def test_impossible_builds_are_refused(environment, message):
    done = run_setup(**environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_a_wheel_works_where_the_repository_is_not(tmp_path):
    """Builds a wheel without kernels, unpacks it elsewhere, and runs an op from there."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path)]
    environment = {**os.environ, "GROUPDETR_FAST_BUILD": "python"}
    subprocess.run([*wheel, str(ROOT)], check=True, env=environment, capture_output=True, timeout=300)
    (file,) = tmp_path.glob("groupdetr_fast-*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(file), str(tmp_path / "site")], check=True)
    # An editable installation would lend its compiled module to the package under test.
    program = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import groupdetr_fast as gd
import torch
assert any("without its compiled kernels" in str(warning.message) for warning in caught)
print(gd.__file__)
print(set(kind for kinds in gd.ops.backends().values() for kind in kinds.values()))
print(gd.ops.linear_assignment(torch.tensor([[3.0, 1.0], [1.0, 5.0]]), torch.tensor(2)).tolist())
"""
    environment["PYTHONPATH"] = str(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    location, kinds, assignment = done.stdout.splitlines()
    assert location.startswith(str(tmp_path))
    assert "C++" not in kinds
    assert assignment == "[1, 0]"
