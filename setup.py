"""Builds the extension ``groupdetr_fast._C`` (stable ABI, one file for every Python 3.10+ and torch 2.11+).

``GROUPDETR_FAST_BUILD`` decides what is compiled:

- ``auto`` (default): the CPU and CUDA kernels if this torch has CUDA and a toolkit is found, else the CPU kernels if a
  C++ compiler is found, else nothing;
- ``cuda``: the CPU and CUDA kernels; an error without a toolkit. No GPU is needed to build;
- ``cpu``: the CPU kernels;
- ``python``: nothing; every op then runs on its PyTorch reference.

``TORCH_CUDA_ARCH_LIST`` is respected.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "python")
STABLE_ABI_VERSION = "0x020b000000000000"  # torch 2.11, the oldest release that has every stable header used here
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def locate_toolkit():
    """Set ``CUDA_HOME`` to the toolkit that the nvcc on the path belongs to, unless the user has set it.

    The nvcc on the path may be a script that calls another one; torch would take the script's folder for the toolkit.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    trial = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    folder = re.search(r"^#\$ _HERE_=(.+)$", trial.stderr, re.MULTILINE)
    if folder:
        os.environ["CUDA_HOME"] = str(Path(folder.group(1)).parent)


def choose_build():
    """Return the build (``"cuda"``, ``"cpu"`` or ``"python"``) and print it with its reason."""
    requested = os.environ.get("GROUPDETR_FAST_BUILD", "auto")
    if requested not in MODES:
        raise SystemExit(f"GROUPDETR_FAST_BUILD must be one of {', '.join(MODES)}; got {requested!r}")
    if requested == "python":
        build, reason = "python", "GROUPDETR_FAST_BUILD=python"
    else:
        locate_toolkit()
        import torch
        from torch.utils.cpp_extension import CUDA_HOME

        toolkit = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        if requested == "cuda" and not (toolkit and torch.version.cuda):
            missing = "a CUDA toolkit (set CUDA_HOME)" if torch.version.cuda else "a torch that was built with CUDA"
            raise SystemExit(f"GROUPDETR_FAST_BUILD=cuda needs {missing}")
        if requested == "cuda" or (requested == "auto" and toolkit and torch.version.cuda and compiler):
            build, reason = "cuda", f"CUDA toolkit at {CUDA_HOME}, torch for CUDA {torch.version.cuda}"
        elif requested == "cpu" or compiler:
            build, reason = "cpu", "GROUPDETR_FAST_BUILD=cpu" if requested == "cpu" else "no usable CUDA toolkit"
        else:
            build, reason = "python", "no C++ compiler found"
    what = {"cuda": "CPU and CUDA kernels", "cpu": "CPU kernels", "python": "no kernels (PyTorch references)"}[build]
    print(f"groupdetr_fast: building {what} ({reason})", flush=True)
    return build


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension_options(build):
    """The arguments of ``setup`` that belong to the extension."""
    if build == "python":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    macros = [("TORCH_TARGET_VERSION", STABLE_ABI_VERSION)]
    compile_args = {"cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno"]}
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    if build == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        files += sources("csrc/cuda/*.cu")
        macros.append(("USE_CUDA", None))
        compile_args["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    extension = CUDAExtension if build == "cuda" else CppExtension
    return {
        "ext_modules": [
            extension(
                "groupdetr_fast._C",
                files,
                include_dirs=[str(ROOT / "csrc")],
                depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
                define_macros=macros,
                extra_compile_args=compile_args,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_options(choose_build()))
