"""The command ``groupdetr env``."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from .. import __version__, ops

__all__ = ["EnvCommand"]


@dataclass(frozen=True)
class EnvCommand:
    """Show versions, devices, and which kernel serves which op."""

    def __call__(self) -> None:
        print(f"groupdetr_fast  {__version__}")
        print(f"Python          {platform.python_version()} on {platform.system()} {platform.machine()}")
        print(f"torch           {torch.__version__}, {torch.get_num_threads()} CPU threads")
        for package in ("torchvision", "triton", "accelerate"):
            print(f"{package:14}  {_version(package)}")
        print(f"CUDA            {torch.version.cuda or 'torch was built without'}")
        for index in range(torch.cuda.device_count()):
            print(f"GPU {index}           {torch.cuda.get_device_name(index)}")
        for op, kernels in ops.backends().items():
            print(f"{op:18}  " + ", ".join(f"{device}: {kind}" for device, kind in kernels.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
