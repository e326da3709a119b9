"""What ``ms_deform_attn`` means, in plain PyTorch: grid_sample on each level, then a weighted sum."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._reference import gradients


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See :func:`groupdetr_fast.ops.ms_deform_attn`; ``spatial_shapes`` is flattened, ``[h0, w0, h1, w1, ...]``."""
    batch, _, heads, dim = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = torch.promote_types(value.dtype, torch.float32)
    sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    maps = value.to(dtype).split([h * w for h, w in sizes], dim=1)  # each [B, h * w, H, D]

    out = value.new_zeros(batch * heads, dim, queries, dtype=dtype)
    for level, (h, w) in enumerate(sizes):
        if h * w == 0 or out.numel() == 0 or points == 0:
            continue
        image = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
        x, y = sampling_locations[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1).unbind(-1)  # [B * H, Lq, P]
        pixel_x, pixel_y = x * w - 0.5, y * h - 0.5
        inside = (pixel_x > -1) & (pixel_x < w) & (pixel_y > -1) & (pixel_y < h)  # False for NaN
        outside = torch.full_like(x, -10.0)  # a location that touches no pixel, so that its sample is exactly 0
        grid = torch.stack([torch.where(inside, 2 * x - 1, outside), torch.where(inside, 2 * y - 1, outside)], dim=-1)
        samples = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)  # [B * H, Lq, P]
        out = out + (samples * weights[:, None]).sum(-1)  # [B * H, D, Lq]
    out = out.view(batch, heads * dim, queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()


def ms_deform_attn_backward_reference(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, sampling_locations and attention_weights.

    ``deterministic`` is for kernels that have a choice; what torch's own ops do is up to torch.
    """

    def result(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)

    inputs = value, sampling_locations, attention_weights
    grad_value, grad_locations, grad_weights = gradients(result, grad_out, *inputs)
    return grad_value, grad_locations, grad_weights
