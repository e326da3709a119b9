"""``ms_deform_attn`` of an inference graph in standard operators, for formats that know no others, such as ONNX."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["deform_by_grid_sample"]


def deform_by_grid_sample(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """``ms_deform_attn`` at finite locations, in few operators: the time that onnx takes grows with their number."""
    batch, _, heads, dim = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    maps = (
        value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], dim=-1)
    )  # [B * H, D, h * w]
    grids = (2 * sampling_locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [levels, B * H, Lq, P, 2]
    samples = [
        F.grid_sample(image.unflatten(-1, size), grid, align_corners=False)
        for image, size, grid in zip(maps, sizes, grids.unbind(), strict=True)
    ]  # [B * H, D, Lq, P]
    weights = attention_weights.to(dtype).flatten(-2).transpose(1, 2).flatten(0, 1)  # [B * H, Lq, levels * P]
    out = (torch.cat(samples, dim=-1) * weights[:, None]).sum(-1)  # [B * H, D, Lq]
    return out.view(batch, heads * dim, -1).transpose(1, 2).to(value.dtype)
