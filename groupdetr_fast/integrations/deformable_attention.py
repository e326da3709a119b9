"""Multi-scale deformable attention by this package's op, in the place of that of others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["Shapes", "attend", "attend_as", "locations_around", "project"]

Shapes = Sequence[tuple[int, int]]


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
