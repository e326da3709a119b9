"""The command ``groupdetr env``."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import __version__, ops
from .._gpus import built_for, capability

__all__ = ["EnvCommand", "running_version"]


@dataclass(frozen=True)
class EnvCommand:
    """Show versions, devices, which kernel serves which op, and why where none does."""

    def __call__(self) -> None:
        print(f"groupdetr_fast  {running_version()}")
        print(f"built for       {built_for()}")
        print(f"Python          {platform.python_version()} on {platform.system()} {platform.machine()}")
        print(f"torch           {torch.__version__}, {torch.get_num_threads()} CPU threads")
        for package in ("torchvision", "triton", "accelerate"):
            print(f"{package:14}  {_version(package)}")
        print(f"CUDA            {torch.version.cuda or 'torch was built without'}")
        for index in range(torch.cuda.device_count()):
            major, minor = capability(index)
            print(f"GPU {index}           {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
        for op, kernels in ops.backends().items():
            print(f"{op:18}  " + ", ".join(f"{device}: {kind}" for device, kind in kernels.items()))
        for sentence in ops.missing_kernels():
            print(f"{sentence[0].upper()}{sentence[1:]}.")


def running_version() -> str:
    """The version of this package with what tells builds of it apart, such as 0.1.0+cpu.

    Run from its source it is the plain version, even where a wheel is installed too.
    """
    try:
        installed = importlib.metadata.distribution("groupdetr_fast")
    except importlib.metadata.PackageNotFoundError:
        return __version__
    package = Path(str(installed.locate_file("groupdetr_fast"))).resolve()
    is_this = package == Path(__file__).resolve().parents[1]
    # An egg-info beside the source may be that of a wheel which was built there; only what is installed has a record.
    return installed.version if is_this and installed.read_text("RECORD") is not None else __version__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
