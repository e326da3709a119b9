"""Which GPUs the compiled kernels and Triton's can serve, and why not, in sentences that say what to do.

GPUs are asked when they are used, not before: that initialises CUDA, after which a process cannot be forked.
"""

import functools
import importlib.util
import sys
from types import ModuleType

import torch

_EXTENSION = "groupdetr_fast._C"
OLDEST_FOR_TRITON = (7, 0)
NO_TRITON = "Triton is not installed (pip install triton)"


def extension() -> ModuleType | None:
    """The compiled kernels' module, once it is loaded."""
    return sys.modules.get(_EXTENSION)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)


def name(index: int) -> str:
    """A GPU as sentences call it: ``GPU 0 (Tesla T4, compute capability 7.5)``."""
    return f"GPU {index} ({torch.cuda.get_device_name(index)}, compute capability {_dotted(capability(index))})"


def built_for() -> str:
    """What the compiled kernels run on: ``the CPU, and with CUDA 13.0 for sm_80, sm_90 and later``."""
    module = extension()
    if module is None:
        return "nothing"
    if not module.architectures:
        return "the CPU"
    return f"the CPU, and with CUDA {_cuda(module.cuda_version)} for {described(module.architectures)}"


def why_not_built() -> str | None:
    """Why there are no CUDA kernels in the extension, or no extension; None if there are."""
    module = extension()
    if module is None:
        return (
            "groupdetr_fast was installed without its compiled kernels (install one of its wheels, or reinstall where "
            "a C++ compiler is; GROUPDETR_FAST_BUILD=cpu shows why it fails)"
        )
    if not module.architectures:
        return (
            "groupdetr_fast was built without CUDA (install its wheel for CUDA, or reinstall where nvcc is; "
            "GROUPDETR_FAST_BUILD=cuda shows why it fails)"
        )
    return None


@functools.cache
def why_not_compiled(index: int) -> str | None:
    """Why the compiled CUDA kernels do not run on a GPU; None if they do. The kernels ask themselves the same."""
    missing = why_not_built()
    module = extension()
    if missing is not None or module is None:
        return missing
    driver = module.cuda_driver_version()
    if driver // 1000 < module.cuda_version // 1000:
        return (
            f"groupdetr_fast was built with CUDA {_cuda(module.cuda_version)}, and the driver supports CUDA "
            f"{_cuda(driver)} (update the driver, or install a build for CUDA {driver // 1000})"
        )
    major, minor = capability(index)
    if not module.has_code(module.architectures, 10 * major + minor):
        return (
            f"groupdetr_fast was built for {described(module.architectures)} (reinstall from source on this machine, "
            f"or with TORCH_CUDA_ARCH_LIST={major}.{minor})"
        )
    return None


@functools.cache
def why_not_triton(index: int) -> str | None:
    """Why Triton's kernels do not run on a GPU; None if they do."""
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    if capability(index) < OLDEST_FOR_TRITON:
        return f"Triton needs compute capability {_dotted(OLDEST_FOR_TRITON)}"
    from triton.runtime import driver

    try:
        driver.active.get_current_device()  # builds Triton's launcher of kernels
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"Triton cannot build what launches its kernels (install gcc or set CC, and install python3-dev): {said[0]}"
        )
    return None


def described(architectures: str) -> str:
    """``sm_80, sm_90 and later`` of what the extension was compiled for, ``sm_80 sm_90 compute_90``."""
    entries = architectures.split()
    machine_code = ", ".join(entry for entry in entries if entry.startswith("sm_"))
    later = any(entry.startswith("compute_") for entry in entries)
    return f"{machine_code} and later" if later else machine_code


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _cuda(version: int) -> str:
    """``13.0`` of 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
