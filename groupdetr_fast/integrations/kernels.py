"""What every integration asks before it puts kernels of this package into a model of another one.

Where there are kernels, and which versions of the other package were tried.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ..ops import serving

__all__ = ["DEVICES", "can_serve", "exchange_parts", "has_kernel", "is_tested", "serves", "serves_everywhere"]

# Types of devices for which a kernel of ops.ms_deform_attn was built. No GPU is asked, as importing must not initialise
# CUDA; has_kernel does that.
DEVICES = frozenset(
    device
    for device, kind in serving.kinds_of("ms_deform_attn", ask_gpu=False).items()
    if kind not in ("reference", "PyTorch")
)
_COMPILED = ("C++", "CUDA")

Version = tuple[int, ...]  # major, minor and, where it matters, the last number


def has_kernel(device: torch.device) -> bool:
    """Whether ops.ms_deform_attn has a kernel that runs on a device; elsewhere it would run its reference."""
    return device.type in DEVICES and (device.type != "cuda" or _is_served(device.index))


@torch.compiler.assume_constant_result  # the extension answers, into which torch.compile does not see
def _is_served(index: int) -> bool:
    return serving.compiled_kernels_run_on(index)


@torch.compiler.assume_constant_result  # the dispatcher answers, into which torch.compile does not see
def serves(op: str, device: torch.device) -> bool:
    """Whether an op has a compiled kernel that runs on a device."""
    compiled = serving.kinds_of(op, ask_gpu=False).get(device.type) in _COMPILED
    return compiled and (device.type != "cuda" or _is_served(device.index))


def serves_everywhere(op: str) -> bool:
    """Whether an op has a compiled kernel on every kind of device that this machine has."""
    kinds = serving.kinds_of(op)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return all(kinds[device] in _COMPILED for device in devices)


def exchange_parts(modules: Iterable[nn.Module], exchanges: Sequence[Callable[[nn.Module], bool]]) -> bool:
    """Let each function exchange, in place, the modules that it knows; whether any of them is exchanged now."""
    return sum(exchange(module) for module in modules for exchange in exchanges) > 0  # any() would stop at the first


def is_tested(version: str, tested: tuple[Version, Version]) -> bool:
    """Whether a version such as "5.24.1" lies between the first version and the last minor version of the tests."""
    first, last = tested
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return first <= numbers and numbers[: len(last)] <= last


def can_serve(
    package: str, version: str, tested: tuple[Version, Version], *, has_kernels: bool, stacklevel: int = 3
) -> bool:
    """Whether kernels may be put into a model of another package.

    Args:
        package, version: of the model.
        tested: the first version and the last minor version that the tests ran with.
        has_kernels: whether there is any compiled kernel for it.
        stacklevel: of the warning: 3 is the caller's caller, and 4 the one above.

    Returns:
        Whether the version is one of these, and there is a kernel; if not, there is a warning.
    """
    first, last = (".".join(map(str, each)) for each in tested)
    if not is_tested(version, tested):
        of_last = ".*" if len(tested[0]) > len(tested[1]) else ""  # beside a first version of three numbers
        versions = first if first == last else f"{first} to {last}{of_last}"
        reason = f"accelerate was tested with {package} {versions}, not {version}"
    elif not has_kernels:
        reason = "groupdetr_fast was installed without its compiled kernels"
    else:
        return True
    warnings.warn(f"{reason}: the model is unchanged", stacklevel=stacklevel)
    return False
