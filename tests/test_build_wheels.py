"""What build_wheels.py builds. The wheels themselves take minutes, and are checked as they are built."""

import os
import runpy
import subprocess
import zipfile
from pathlib import Path

import pytest

functions = runpy.run_path(str(Path(__file__).parents[1] / "build_wheels.py"), run_name="under_test")
Variant, variant_of = functions["Variant"], functions["variant_of"]


@pytest.mark.parametrize(
    ("version", "known", "label", "architectures"),
    [
        ("13.0", (75, 80, 86, 87, 89, 90, 100, 120), "cu130", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("12.9", (50, 70, 75, 80, 86, 89, 90, 100, 120), "cu129", "7.0;7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("12.4", (70, 75, 80, 86, 89, 90), "cu124", "7.0;7.5;8.0;8.6;8.9;9.0+PTX"),
    ],
)
def test_a_toolkit_compiles_for_what_it_knows(version, known, label, architectures, made_up_toolkit):
    variant = variant_of(Path(made_up_toolkit(version, *known)))
    assert variant.label == label
    assert variant.architectures == architectures
    environment = variant.environment()
    assert environment["GROUPDETR_FAST_LOCAL_VERSION"] == label
    assert environment["TORCH_CUDA_ARCH_LIST"] == architectures
    assert environment["CUDA_HOME"] == str(variant.toolkit)
    assert environment["GROUPDETR_FAST_BUILD"] == "cuda"


def test_the_wheel_for_the_cpu_has_no_toolkit():
    environment = Variant("cpu").environment()
    assert environment["GROUPDETR_FAST_BUILD"] == "cpu"
    assert "CUDA_HOME" not in environment


def test_a_folder_without_nvcc_is_no_toolkit(tmp_path):
    with pytest.raises(SystemExit, match="is no CUDA toolkit: it has no bin/nvcc"):
        variant_of(tmp_path)


def test_toolkits_are_found_once_each(monkeypatch, made_up_toolkit):
    first, second = made_up_toolkit("13.0", 80), made_up_toolkit("12.9", 80)
    monkeypatch.setenv("CUDA_HOME", first)
    monkeypatch.delenv("CUDA12_HOME", raising=False)
    assert functions["found_toolkits"]() == [Path(first)]
    monkeypatch.setenv("CUDA12_HOME", second)
    assert functions["found_toolkits"]() == [Path(first), Path(second)]
    monkeypatch.setenv("CUDA12_HOME", first)
    assert functions["found_toolkits"]() == [Path(first)]


def test_the_toolkit_of_the_nvcc_on_the_path_is_found(monkeypatch, tmp_path):
    """It may be a script that calls another one, which says where that is."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDA12_HOME"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever was set meanwhile
        monkeypatch.delenv(name)
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/cuda/bin' >&2\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert functions["found_toolkits"]() == [Path("/opt/cuda")]


def test_a_wheel_that_cannot_be_imported_says_why(tmp_path, capfd):
    wheel = tmp_path / "broken.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("groupdetr_fast/__init__.py", "raise ImportError('symbols are missing')")
    with pytest.raises(subprocess.CalledProcessError):
        functions["check_import"](wheel, tmp_path / "unpacked")
    assert "ImportError: symbols are missing" in capfd.readouterr().err
