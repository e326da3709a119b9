"""The op ``ms_deform_attn``: multi-scale deformable attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._eager import EagerOp
from ..._library import block_double_backward, define_op
from .reference import ms_deform_attn_backward_reference, ms_deform_attn_reference

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum values that are sampled from several feature maps at given places (Deformable DETR, equation 3).

    For every query and head the result is the sum over levels and points of attention weight times value, the value
    being interpolated bilinearly between pixels. Pixel ``(i, j)`` of a map lies at ``((j + 0.5) / w, (i + 0.5) / h)``,
    and outside a map all values are 0, as in ``grid_sample`` with ``align_corners=False`` and zero padding. A sample
    that touches no pixel, or whose location is NaN or infinite, contributes 0 and gets zero gradients.

    Args:
        value: ``[B, S, H, D]``, the feature maps of all levels, flattened row by row, one level after another.
        spatial_shapes: ``(h, w)`` of each level in pixels, as numbers on the host; ``S`` is the sum of ``h * w``.
            A level may be empty.
        sampling_locations: ``[B, Lq, H, levels, P, 2]``, ``(x, y)`` in units of the map's width and height.
        attention_weights: ``[B, Lq, H, levels, P]``, usually a softmax over levels and points.

    Returns:
        ``[B, Lq, H * D]`` in the dtype of ``value``.

    ``value`` may be float32, float64, float16 or bfloat16; locations and weights have its dtype or float32. The
    arithmetic is float32 (float64 for float64 values). Keep locations in float32: a half type resolves large maps no
    finer than a good part of a pixel.

    On the CPU forward and backward are deterministic for a given number of threads, and independent of that number
    where ``B * H`` is at least as large. On a GPU the forward is deterministic; the backward adds up the gradient of
    ``value`` in any order, unless ``torch.use_deterministic_algorithms`` is on. Where there are many samples, as in an
    encoder, it sorts them first, which takes 20 bytes of memory a sample, of as many images at a time as need 256 MiB;
    in shared memory, and then from fewer samples on, if the environment variable
    ``GROUPDETR_FAST_DEFORMABLE_SHARED_SORT`` is 1 when the package is imported, which no GPU has timed. There is no
    double backward. The kernels for GPUs take up to 16 levels.

    The backward pass of half types has a second kernel for sorted samples, on tensor cores (compute capability 8.0 and
    later, up to 64 channels a head, a multiple of 8). It serves where it can, unless the environment variable
    ``GROUPDETR_FAST_DEFORMABLE_TILES`` is 0 when the package is imported. Where a gradient of the result is not finite,
    it makes those of up to eight pixels around each of its samples so. The forward pass of half types has a second
    kernel on tensor cores, too, for any multiple of 8 channels. It serves only if the environment variable
    ``GROUPDETR_FAST_DEFORMABLE_PRODUCTS`` is 1 when the package is imported; a value that is not finite makes results
    of up to four queries and heads NaN there.

    Raises:
        TypeError: if a dtype is none of these.
        ValueError: if a shape or a device does not fit.
    """
    shapes = [tuple(shape) for shape in spatial_shapes]
    _check(value, shapes, sampling_locations, attention_weights)
    flat = [size for shape in shapes for size in shape]
    return _op(value, flat, sampling_locations, attention_weights)


def _check(value: Tensor, shapes: list[tuple[int, ...]], locations: Tensor, weights: Tensor) -> None:
    if value.dtype not in _DTYPES:
        raise TypeError(f"value must be float32, float64, float16 or bfloat16, got {value.dtype}")
    for name, tensor in (("sampling_locations", locations), ("attention_weights", weights)):
        if tensor.dtype not in (value.dtype, torch.float32):
            raise TypeError(f"{name} must be float32 or have the dtype of value, {value.dtype}, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} must lie on the device of value, {value.device}, got {tensor.device}")
    if value.dim() != 4:
        raise ValueError(f"value must have shape [B, S, H, D], got {list(value.shape)}")
    if any(len(shape) != 2 or min(shape) < 0 for shape in shapes):
        raise ValueError(f"spatial_shapes must hold (h, w), not negative, for each level, got {shapes}")
    pixels = sum(h * w for h, w in shapes)
    if value.shape[1] != pixels:
        raise ValueError(f"value must have shape [B, {pixels}, H, D] for these spatial_shapes, got {list(value.shape)}")
    if weights.dim() != 5 or (weights.shape[0], *weights.shape[2:4]) != (value.shape[0], value.shape[2], len(shapes)):
        expected = f"[{value.shape[0]}, Lq, {value.shape[2]}, {len(shapes)}, P]"
        raise ValueError(f"attention_weights must have shape {expected}, got {list(weights.shape)}")
    if tuple(locations.shape) != (*weights.shape, 2):
        expected = f"{[*weights.shape, 2]}, that of attention_weights and 2"
        raise ValueError(f"sampling_locations must have shape {expected}, got {list(locations.shape)}")


def _fake(value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * dim)


def _fake_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        sampling_locations.new_empty(sampling_locations.shape),
        attention_weights.new_empty(attention_weights.shape),
    )


define_op(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) "
    "-> Tensor",
    reference=ms_deform_attn_reference,
    fake=_fake,
    public=True,
    called_by_kernels=True,
)
define_op(
    "ms_deform_attn_backward(Tensor grad_out, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    "Tensor attention_weights, bool deterministic=False) -> (Tensor, Tensor, Tensor)",
    reference=ms_deform_attn_backward_reference,
    fake=_fake_backward,
    called_by_kernels=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _op_backward(
        grad_out,
        value,
        ctx.spatial_shapes,
        sampling_locations,
        attention_weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    if grad_value.shape[0] == 1 and grad_value.device.type == "cpu":
        grad_value = _by_channel(grad_value)
    no_grad_spatial_shapes = None
    return grad_value, no_grad_spatial_shapes, grad_locations, grad_weights


def _by_channel(grad: Tensor) -> Tensor:
    """The same ``[B, S, H, D]``, in memory as ``[B, H, D, S]``.

    Where the values are feature maps, with no linear layer between, the maps' gradient takes the layout of the values'.
    Token by token it would have, for a single image, the strides (C, 1, W * C, C), for which the backward pass of
    torch's BatchNorm2d on CPUs permutes the gradient (torch 2.14.1).
    """
    return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


_op = EagerOp("ms_deform_attn")
_op_backward = EagerOp("ms_deform_attn_backward")
_op.register_autograd(setup_context=_setup_context, backward=_backward)
block_double_backward("ms_deform_attn_backward")
