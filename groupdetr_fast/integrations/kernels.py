"""What every integration asks before it puts kernels of this package into a model of another one.

Where there are kernels, which versions of the other package were tried, and the deformable attention that stands in.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops

__all__ = ["DEVICES", "Shapes", "attend", "is_tested", "serves_everywhere", "warn_unchanged"]

# Types of devices for which ops.ms_deform_attn has a kernel; elsewhere it would run its reference.
DEVICES = frozenset(
    device for device, kind in ops.backends()["ms_deform_attn"].items() if kind not in ("reference", "PyTorch")
)

Shapes = Sequence[tuple[int, int]]
Version = tuple[int, int]  # major and minor


def attend(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The op, with the dtypes that it wants: autocast leaves locations and weights in a half type beside float32."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    locations, weights = (x if x.dtype == value.dtype else x.to(dtype) for x in (locations, weights))
    return ops.ms_deform_attn(value, spatial_shapes, locations, weights)


def serves_everywhere(op: str) -> bool:
    """Whether an op has a compiled kernel on every kind of device that this machine has."""
    kinds = ops.backends()[op]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return all(kinds[device] in ("C++", "CUDA") for device in devices)


def is_tested(version: str, first: Version, last: Version) -> bool:
    """Whether a version lies between two minor versions, these included."""
    major, minor = version.split(".")[:2]
    return first <= (int(major), int(minor)) <= last


def warn_unchanged(reason: str) -> None:
    """Warn, on behalf of the caller's caller, that a model stays as it is."""
    warnings.warn(f"{reason}: the model is unchanged", stacklevel=3)
