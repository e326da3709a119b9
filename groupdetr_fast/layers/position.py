"""Sine position embeddings of feature maps and of reference points (DETR, appendix; Conditional DETR, eq. 4)."""

import math

import torch
from torch import Tensor

__all__ = ["image_position_embedding", "sine_position_embedding"]


def image_position_embedding(
    padding: Tensor,
    dim: int,
    temperature: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    *,
    offset: float = 0.0,
) -> Tensor:
    """Embedding of every cell of a feature map, normalised by the size of the image's unpadded part.

    Args:
        padding: ``[B, H, W]`` bool, True on padding.
        dim: size of the embedding, a multiple of 4; its first half encodes y, its second half x.
        temperature: base of the geometric series of wave lengths.
        offset: added to the positions, which count cells from 1; -0.5 gives the cells' centres (Deformable DETR).

    Returns:
        ``[B, H, W, dim]``.
    """
    valid = (~padding).to(torch.float32)
    y, x = valid.cumsum(1), valid.cumsum(2)
    eps = 1e-6
    position = torch.stack(((x + offset) / (x[:, :, -1:] + eps), (y + offset) / (y[:, -1:, :] + eps)), dim=-1)
    return sine_position_embedding(position, dim, temperature).to(dtype)


def sine_position_embedding(position: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Embedding of normalised points or boxes.

    Args:
        position: ``[..., n]`` in [0, 1], with n = 2 (x, y) or 4 (x, y, width, height).
        dim: size of the embedding of two coordinates, a multiple of 4.

    Returns:
        ``[..., n * dim / 2]``: the parts of y, x, and then width and height; in each part sine and cosine alternate.
    """
    part = dim // 2
    exponent = torch.arange(0, part, 2, device=position.device, dtype=torch.float32) / part
    frequency = 2 * math.pi / temperature**exponent  # [part / 2]
    # Not by a list of indices, which would be copied to the GPU while the host waits.
    y_first = torch.cat((position[..., 1:2], position[..., :1], position[..., 2:]), dim=-1)
    angle = y_first.float()[..., None] * frequency  # [..., n, part / 2]
    waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)  # [..., n, part]
    return waves.flatten(-2).to(position.dtype)
