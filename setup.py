"""Builds the extension ``groupdetr_fast._C`` (stable ABI, one file for every Python 3.10+ and torch 2.11+).

``GROUPDETR_FAST_BUILD`` decides what is compiled:

- ``auto`` (default): the CPU and CUDA kernels if this torch has CUDA and a toolkit is found, else the CPU kernels if a
  C++ compiler is found, else nothing;
- ``cuda``: the CPU and CUDA kernels; an error without a toolkit. No GPU is needed to build;
- ``cpu``: the CPU kernels;
- ``python``: nothing; every op then runs on its PyTorch reference.

``TORCH_CUDA_ARCH_LIST`` decides for which GPUs, as ``8.0;9.0+PTX``. Without it these are the GPUs of this machine, and
``DEFAULT_ARCHITECTURES`` where there are none.

For wheels (``build_wheels.py``): ``GROUPDETR_FAST_LOCAL_VERSION`` is appended to the version, as in
``0.1.0+cu130``; ``GROUPDETR_FAST_OLD_GLIBC=1`` lets the extension run where the C library is older than here, from
glibc 2.28 on.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "python")
STABLE_ABI_VERSION = "0x020b000000000000"  # torch 2.11, the oldest release that has every stable header used here
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0+PTX")


def version():
    """The package's own, and after a plus sign that of the build if it has one."""
    text = (ROOT / "groupdetr_fast" / "__init__.py").read_text()
    local = os.environ.get("GROUPDETR_FAST_LOCAL_VERSION")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1) + (f"+{local}" if local else "")


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


def capabilities_at_hand():
    """The compute capabilities of this machine's GPUs, as ``(7, 5)``; empty without any."""
    import torch

    if torch.cuda.is_available():
        return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    try:  # torch may be one without CUDA, or for another driver than this one
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", answer, re.MULTILINE)})


def compiled_by(nvcc):
    """The compute capabilities that an nvcc compiles for, as ``(7, 5)``."""
    answer = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return sorted(
        {(int(number[:-1]), int(number[-1])) for number in re.findall(r"^compute_(\d+)$", answer, re.MULTILINE)}
    )


def release_of(nvcc):
    """The CUDA release of an nvcc, as ``"13.0"``."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", answer).group(1)


def for_gpus(capabilities, compiled):
    """What to compile for these GPUs, as ``TORCH_CUDA_ARCH_LIST`` has it; empty if nvcc knows none of them.

    GPUs that are newer than nvcc get PTX of the newest that it knows, from which their driver makes code.
    """
    newest = compiled[-1]
    known = ["{}.{}".format(*capability) for capability in capabilities if capability in compiled]
    later = [f"{newest[0]}.{newest[1]}+PTX"] if any(capability > newest for capability in capabilities) else []
    return known + later


def choose_architectures(nvcc):
    """Return what to compile for, as ``["8.0", "9.0+PTX"]``, and print it with its reason."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        found, reason = re.split(r"[;,\s]+", asked.strip("; ")), "TORCH_CUDA_ARCH_LIST"
    else:
        capabilities = capabilities_at_hand()
        found, reason = for_gpus(capabilities, compiled_by(nvcc)), "the GPUs of this machine"
        if not found:
            gpus = ", ".join("{}.{}".format(*capability) for capability in capabilities)
            reason = f"{nvcc} does not compile for this machine's {gpus}" if gpus else "no GPU in this machine"
            found = list(DEFAULT_ARCHITECTURES)
    unknown = [entry for entry in found if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry)]
    if unknown:
        raise SystemExit(
            "TORCH_CUDA_ARCH_LIST must hold compute capabilities with semicolons in between, as 8.0;9.0+PTX; "
            f"got {unknown[0]!r}"
        )
    print(f"groupdetr_fast: compiling for compute capability {', '.join(found)} ({reason})", flush=True)
    return found


def codes(architectures):
    """What nvcc makes for ``["8.0", "9.0+PTX"]``, in its words: ``["sm_80", "sm_90", "compute_90"]``."""
    result = []
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        result += [f"sm_{number}", *([f"compute_{number}"] if entry.endswith("+PTX") else [])]
    return list(dict.fromkeys(result))


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def link_own_cuda_runtime(extension):
    """Link CUDA's runtime into the extension, and nothing that only a torch with CUDA has.

    The extension then loads in any torch, whichever CUDA that is for, and in one without. Several runtimes in a process
    share each GPU's context, and streams are the driver's. What the kernels need of torch comes by way of libtorch.so,
    which every torch has, and whose symbols cuda_common.h declares weak.
    """
    extension.libraries = [name for name in extension.libraries if name not in ("cudart", "c10_cuda", "torch_cuda")]
    extension.libraries += ["cudart_static", "dl", "pthread", "rt"]
    extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]


def build_command(cuda):
    """The command ``build_ext`` of setuptools."""
    import torch
    from torch.utils import cpp_extension

    if cuda:
        # Torch refuses toolkits of another CUDA than its own; here nothing that is taken from torch depends on that.
        torch.version.cuda = release_of(cuda)
    return cpp_extension.BuildExtension


def extension_options(build):
    """The arguments of ``setup`` that belong to the extension."""
    if build == "python":
        return {}
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    macros = [("TORCH_TARGET_VERSION", STABLE_ABI_VERSION)]
    compile_args = {"cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno"]}
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    if os.environ.get("GROUPDETR_FAST_OLD_GLIBC") == "1":
        if (platform.machine(), platform.libc_ver()[0]) != ("x86_64", "glibc"):
            raise SystemExit("GROUPDETR_FAST_OLD_GLIBC=1 is for x86-64 and glibc")
        macros.append(("GROUPDETR_FAST_OLD_GLIBC", None))
    nvcc = None
    if build == "cuda":
        nvcc = str(Path(CUDA_HOME) / "bin" / "nvcc")
        files += sources("csrc/cuda/*.cu")
        made = codes(choose_architectures(nvcc))
        macros += [("USE_CUDA", None), ("GROUPDETR_FAST_ARCHITECTURES", '"{}"'.format(" ".join(made)))]
        targets = [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in made]
        compile_args["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *targets]
    extension = (CUDAExtension if build == "cuda" else CppExtension)(
        "groupdetr_fast._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        define_macros=macros,
        extra_compile_args=compile_args,
        py_limited_api=True,
    )
    if build == "cuda":
        link_own_cuda_runtime(extension)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build_command(nvcc)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":  # as for pip; tests read the functions above
    setup(version=version(), **extension_options(choose_build()))
