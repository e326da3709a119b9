"""The command ``groupdetr env``."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from .. import __version__, ops
from .._gpus import built_for, capability

__all__ = ["EnvCommand"]


@dataclass(frozen=True)
class EnvCommand:
    """Show versions, devices, which kernel serves which op, and why where none does."""

    def __call__(self) -> None:
        print(f"groupdetr_fast  {__version__}")
        print(f"Python          {platform.python_version()} on {platform.system()} {platform.machine()}")
        print(f"torch           {torch.__version__}, {torch.get_num_threads()} CPU threads")
        for package in ("torchvision", "triton", "accelerate"):
            print(f"{package:14}  {_version(package)}")
        print(f"CUDA            {torch.version.cuda or 'torch was built without'}")
        print(f"built for       {built_for()}")
        for index in range(torch.cuda.device_count()):
            major, minor = capability(index)
            print(f"GPU {index}           {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
        for op, kernels in ops.backends().items():
            print(f"{op:18}  " + ", ".join(f"{device}: {kind}" for device, kind in kernels.items()))
        for sentence in ops.missing_kernels():
            print(f"{sentence[0].upper()}{sentence[1:]}.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
