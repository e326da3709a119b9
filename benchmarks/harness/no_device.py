"""Triton without a GPU: kernels are compiled as for one, launched by Triton's own launcher, and do nothing.

The launcher is Triton's own, linked to a CUDA driver library that is made here and whose functions succeed and do
nothing else. So the host does all that it does for a launch, up to the call of the driver.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

__all__ = ["CAPABILITY", "idle_driver"]

CAPABILITY = (9, 0)
_DEVICE = 99  # Triton keeps what it compiles by this number: not that of a GPU
_MARK = "-idle-driver"  # in the name of the folder of a library
# Functions of the driver that Triton's launcher is linked to, or looks up.
_FUNCTIONS = """
cuCtxGetCurrent cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDevicePrimaryCtxRetain
cuDriverGetVersion cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuInit cuLaunchKernelEx cuModuleGetFunction
cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveClusters cuPointerGetAttribute cuTensorMapEncodeIm2col
cuTensorMapEncodeTiled
"""
# What else it asks: threads of a block, and shared memory. Contexts and functions are numbers that are not 0.
_SOURCE = """
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
"""


@contextmanager
def idle_driver() -> Iterator[None]:
    """Inside, Triton launches kernels for a device that is not there; tensors may lie anywhere.

    Raises:
        ImportError: if Triton is not installed.
        RuntimeError: if the process has a true driver, or there is no gcc, which Triton compiles its launcher with.
    """
    from triton import knobs
    from triton.backends.nvidia.driver import libcuda_dirs, library_dirs
    from triton.runtime import driver

    if _has_true_driver():
        raise RuntimeError(
            "this process has a CUDA driver: where there is a GPU, measure by benchmarks/gpu_report.py ops"
        )
    if shutil.which("gcc") is None:
        raise RuntimeError("Triton's launcher is compiled with gcc, which is not installed")
    with tempfile.TemporaryDirectory(suffix=_MARK) as folder:
        source, library = Path(folder, "cuda.c"), Path(folder, "libcuda.so.1")
        returns = {"cuPointerGetAttribute": "*(void **)a = c;"}
        texts = [
            f"int {name}(void *a, long b, void *c) {{ {returns.get(name, '')} return 0; }}"
            for name in _FUNCTIONS.split()
        ]
        source.write_text("\n".join([*texts, _SOURCE]))
        # "-w": their true types do not matter
        command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # by its soname, whoever asks for it from now on gets it
        settings = mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", folder)})
        with settings, mock.patch.object(knobs.nvidia, "libcuda_path", folder):
            before = driver._active
            for remembered in (libcuda_dirs, library_dirs):
                remembered.cache_clear()
            driver.set_active(_driver())
            try:
                yield
            finally:
                driver._active = before
                for remembered in (libcuda_dirs, library_dirs):
                    remembered.cache_clear()


def _has_true_driver() -> bool:
    """Whether the process has loaded a driver that was not made here."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return any("libcuda.so" in line and _MARK not in line for line in mapped)


def _driver() -> object:
    from triton.backends.nvidia.driver import CudaDriver

    class IdleDriver(CudaDriver):
        def get_current_device(self) -> int:
            return _DEVICE

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int) -> tuple[int, int]:
            return CAPABILITY

    made = IdleDriver()
    for name in ("get_current_device", "get_current_stream", "get_device_capability"):
        vars(made).pop(name, None)  # torch's, which ask for a GPU
    return made
