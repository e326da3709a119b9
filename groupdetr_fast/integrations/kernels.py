"""What every integration asks before it puts kernels of this package into a model of another one.

Where there are kernels, which versions of the other package were tried, and the deformable attention that stands in.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import serving

__all__ = [
    "DEVICES",
    "Shapes",
    "attend",
    "attend_as",
    "can_serve",
    "exchange_parts",
    "has_kernel",
    "is_tested",
    "locations_around",
    "project",
    "serves",
    "serves_everywhere",
]

# Types of devices for which a kernel of ops.ms_deform_attn was built. No GPU is asked, as importing must not initialise
# CUDA; has_kernel does that.
DEVICES = frozenset(
    device
    for device, kind in serving.kinds_of("ms_deform_attn", ask_gpu=False).items()
    if kind not in ("reference", "PyTorch")
)
_COMPILED = ("C++", "CUDA")

Shapes = Sequence[tuple[int, int]]
Version = tuple[int, ...]  # major, minor and, where it matters, the last number


def attend(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The op, with the dtypes that it wants: autocast leaves locations and weights in a half type beside float32."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    locations, weights = (x if x.dtype == value.dtype else x.to(dtype) for x in (locations, weights))
    return ops.ms_deform_attn(value, spatial_shapes, locations, weights)


def attend_as(
    module: Any,
    query: Tensor,
    points: Tensor,
    tokens: Tensor,
    spatial_shapes: Shapes,
    padding: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """What Deformable DETR's attention module computes, whose parts have these names in other packages, too.

    Args:
        module: with ``value_proj``, ``sampling_offsets``, ``attention_weights``, ``output_proj``, ``n_heads``,
            ``n_levels`` and ``n_points``.
        query: ``[B, Lq, d]``.
        points: ``[B, Lq, levels or 1, 2 or 4]``, reference points, or boxes around them.
        tokens: ``[B, S, d]``.
        spatial_shapes: ``(h, w)`` of each level.
        padding: ``[B, S]`` bool, tokens whose values count as zero.
        sizes: ``[levels, 2]``, ``spatial_shapes`` on the device, where it is at hand; read with points of two numbers.

    Returns:
        ``[B, Lq, d]``.
    """
    value, offsets, weights = project(module, query, tokens, padding)
    if points.shape[-1] == 2:
        locations = locations_around(points, offsets, spatial_shapes, sizes)
    else:
        center, size = points[:, :, None, :, None].split(2, dim=-1)
        locations = center + offsets / module.n_points * size * 0.5
    return module.output_proj(attend(value, spatial_shapes, locations, weights))


def project(
    module: Any, query: Tensor, tokens: Tensor, padding: Tensor | None = None, position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[B, S, H, D]``, offsets ``[B, Lq, H, levels, P, 2]`` and weights ``[B, Lq, H, levels, P]``.

    Arguments are those of :func:`attend_as`, and ``position`` ``[B, Lq, d]``, which is added to the query.
    """
    query = query if position is None else query + position
    value = module.value_proj(tokens)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0)
    samples = (module.n_levels, module.n_points)
    offsets = module.sampling_offsets(query).unflatten(-1, (module.n_heads, *samples, 2))
    weights = module.attention_weights(query).unflatten(-1, (module.n_heads, -1)).softmax(-1)
    return value.unflatten(-1, (module.n_heads, -1)), offsets, weights.unflatten(-1, samples)


def locations_around(points: Tensor, offsets: Tensor, spatial_shapes: Shapes, sizes: Tensor | None = None) -> Tensor:
    """Locations ``[B, Lq, H, levels, P, 2]`` at offsets, in pixels of each level, from points of two numbers.

    Arguments are those of :func:`attend_as`, and the offsets of :func:`project`.
    """
    sizes = offsets.new_tensor(spatial_shapes) if sizes is None else sizes
    return points[:, :, None, :, None] + offsets / sizes.flip(-1)[:, None]


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


def can_serve(package: str, version: str, tested: tuple[Version, Version], *, has_kernels: bool) -> bool:
    """Whether kernels may be put into a model of another package.

    Args:
        package, version: of the model.
        tested: the first version and the last minor version that the tests ran with.
        has_kernels: whether there is any compiled kernel for it.

    Returns:
        Whether the version is one of these, and there is a kernel; if not, the caller's caller is warned.
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
    warnings.warn(f"{reason}: the model is unchanged", stacklevel=3)
    return False
