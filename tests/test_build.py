"""What setup.py decides to build and for which GPUs, and that wheels and source distributions work elsewhere."""

import os
import runpy
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

import groupdetr_fast as gd

ROOT = Path(__file__).parents[1]
functions = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_test")


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


@pytest.fixture
def gpus(tmp_path):
    """A function that puts an nvidia-smi on the path, which tells of GPUs of these compute capabilities."""

    def make(*capabilities):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\n" + "".join(f"echo {capability}\n" for capability in capabilities))
        tool.chmod(0o755)
        return f"{tool.parent}:{os.environ['PATH']}"

    return make


@pytest.mark.parametrize(
    ("version", "known", "capabilities", "asked", "line"),
    [
        ("13.0", (75, 80, 90, 120), ("7.5",), None, "7.5 (the GPUs of this machine)"),
        ("13.0", (75, 80, 90, 120), ("9.0", "8.0", "9.0"), None, "8.0, 9.0 (the GPUs of this machine)"),
        ("12.4", (70, 80, 90), ("7.0", "12.0"), None, "7.0, 9.0+PTX (the GPUs of this machine)"),
        ("13.0", (75, 80, 90), ("7.0",), None, "7.5, 8.0, 9.0+PTX (NVCC does not compile for this machine's 7.0)"),
        ("13.0", (75, 80, 90), (), None, "7.5, 8.0, 9.0+PTX (no GPU in this machine)"),
        ("13.0", (75, 80, 90), ("[N/A]",), None, "7.5, 8.0, 9.0+PTX (no GPU in this machine)"),
        ("13.0", (75, 80, 90), ("7.5",), "8.0;9.0a+PTX", "8.0, 9.0a+PTX (TORCH_CUDA_ARCH_LIST)"),
        ("13.0", (75, 80, 90), ("7.5",), "8.0 8.6", "8.0, 8.6 (TORCH_CUDA_ARCH_LIST)"),
    ],
)
def test_kernels_are_compiled_for_the_gpus_at_hand(
    version, known, capabilities, asked, line, made_up_toolkit, gpus, monkeypatch, capsys
):
    home = made_up_toolkit(version, *known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # asked first; then nvidia-smi
    monkeypatch.setenv("PATH", gpus(*capabilities))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked or "")
    functions["choose_architectures"](f"{home}/bin/nvcc")
    expected = f"groupdetr_fast: compiling for compute capability {line}".replace("NVCC", f"{home}/bin/nvcc")
    assert capsys.readouterr().out == f"{expected}\n"


def test_torch_is_asked_for_gpus_first(monkeypatch, gpus):
    monkeypatch.setenv("PATH", gpus("9.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 6), (7, 5), (8, 6)][index])
    assert functions["capabilities_at_hand"]() == [(7, 5), (8, 6)]


def test_what_nvcc_makes():
    assert functions["codes"](["7.5", "9.0a", "12.0+PTX"]) == ["sm_75", "sm_90a", "sm_120", "compute_120"]


def test_architectures_that_are_no_compute_capabilities_are_refused(made_up_toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Ada")
    with pytest.raises(SystemExit, match=r"capabilities with semicolons in between, as 8.0;9.0\+PTX; got 'Ada'"):
        functions["choose_architectures"](f"{made_up_toolkit('13.0', 80)}/bin/nvcc")


def test_wheels_of_several_builds_have_versions_of_their_own():
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "GROUPDETR_FAST_BUILD": "python", "GROUPDETR_FAST_LOCAL_VERSION": "cu130"},
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout.splitlines()[-1]
    assert version == f"{gd.__version__}+cu130"


@pytest.mark.slow
def test_a_source_distribution_installs_in_a_fresh_environment(tmp_path):
    """Compiled there for the CPU; torch, pip and what these need are borrowed from this environment."""
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    environment = {**os.environ, "GROUPDETR_FAST_BUILD": "cpu", "MAX_JOBS": "2"}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, env=environment, capture_output=True
    )
    (file,) = tmp_path.glob("groupdetr_fast-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    in_repository = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert in_repository | {"setup.py", "pyproject.toml", "LICENSE", "NOTICE", "README.md"} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "docs"))}
    assert not {name for name in names if name.endswith(".so")}

    folder = tmp_path / "environment"
    # Not with the setuptools that Python brings, which may be older than pyproject.toml asks for.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", str(file)]
    subprocess.run(install, check=True, env=environment, capture_output=True, timeout=1800)
    program = """
import groupdetr_fast as gd
print(gd.__file__)
print(gd.ops.backends()["linear_assignment"]["cpu"])
"""
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    location, kind = done.stdout.splitlines()
    assert location.startswith(str(site))
    assert kind == "C++"


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
