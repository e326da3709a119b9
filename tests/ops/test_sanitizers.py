"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with thousands of random arguments."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import groupdetr_fast

ROOT = Path(__file__).parents[2]
CASES = 3000
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.slow


def runtime(name):
    """Path of a library of the compiler; skips the test where it is missing."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A folder with a copy of the package whose extension is sanitized."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("the sanitizers need g++ on Linux")
    folder = tmp_path_factory.mktemp("sanitized")
    package = Path(groupdetr_fast.__file__).parent
    shutil.copytree(package, folder / "groupdetr_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", sysconfig.get_paths()["include"]]
    includes += [flag for path in include_paths() for flag in ("-isystem", path)]
    macros = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
    objects = []
    for source in [ROOT / "csrc" / "module.cpp", *(ROOT / "csrc" / "cpu").glob("*.cpp")]:
        objects.append(folder / f"{source.stem}.o")
        command = ["g++", *FLAGS, *SANITIZERS, *macros, *includes, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    target = folder / "groupdetr_fast" / "_C.abi3.so"
    subprocess.run(["g++", "-shared", *SANITIZERS, *objects, *libraries, "-o", target], check=True)
    return folder


# What the kernels have code of their own for: 16, 32 and 64 bytes at a time.
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_random_arguments(sanitized, capability):
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "PYTHONPATH": str(sanitized),
        # The program is not sanitized: the runtime must be there first, and with it what it wraps.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    first = {"default": 0, "avx2": CASES, "avx512": 2 * CASES}[capability]
    command = [sys.executable, Path(__file__).with_name("fuzzed_kernels.py"), str(first), str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:8000]
    assert len(done.stdout.splitlines()) == CASES


def test_the_sanitized_kernels_are_those_of_the_copy(sanitized):
    program = f"import groupdetr_fast, sys; print(sys.modules['groupdetr_fast._C'].__file__, {torch.__version__!r})"
    environment = {**os.environ, "PYTHONPATH": str(sanitized), "ASAN_OPTIONS": "detect_leaks=0"}
    environment["LD_PRELOAD"] = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd="/")
    assert done.stdout.startswith(str(sanitized)), done.stderr
