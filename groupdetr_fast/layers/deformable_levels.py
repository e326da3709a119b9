"""Feature maps of several resolutions as one sequence of tokens (Deformable DETR, section 4.1)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .position import image_position_embedding

__all__ = ["InputProjections", "Levels", "join_levels", "norm_groups"]


class Levels(NamedTuple):
    """Where the S tokens of several feature maps lie: one map after another, each row by row.

    Attributes:
        shapes: (height, width) of each map, on the host.
        sizes: ``[levels, 2]`` float32, (width, height): the same numbers on the device.
        padding: ``[B, S]`` bool, True on padding; None if no image is padded.
        valid_ratios: ``[B or 1, levels, 2]`` float32, the unpadded part of each map's (width, height).
        centers: ``[B or 1, S, 2]`` float32, the centre (x, y) of each cell, in units of the image without its padding.
    """

    shapes: tuple[tuple[int, int], ...]
    sizes: Tensor
    padding: Tensor | None
    valid_ratios: Tensor
    centers: Tensor


def norm_groups(dim: int) -> int:
    """Groups of a GroupNorm over ``dim`` channels: 32 for 256, and groups of 8 channels also where there are fewer."""
    return math.gcd(32, dim, dim // 8)


class InputProjections(nn.ModuleList):
    """Projections of the backbone's maps to ``dim`` channels, and coarser maps made from the last one.

    Every map gets a 1x1 convolution. Each further level is a 3x3 convolution of stride 2: the first one of the
    backbone's last map, the others of the level before.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        num_levels: maps to return, at least as many.
        dim: their channels.
        norm: whether a GroupNorm follows each convolution.
    """

    def __init__(self, in_channels: Sequence[int], num_levels: int, dim: int, *, norm: bool = True):
        convolutions = [nn.Conv2d(channels, dim, 1) for channels in in_channels]
        for index in range(num_levels - len(in_channels)):
            convolutions.append(nn.Conv2d(dim if index else in_channels[-1], dim, 3, stride=2, padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        groups = norm_groups(dim)
        super().__init__(
            nn.Sequential(convolution, nn.GroupNorm(groups, dim) if norm else nn.Identity())
            for convolution in convolutions
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """``[B, C, h, w]`` per map of the backbone -> ``[B, dim, h, w]`` per level."""
        sources = [*features, features[-1]]
        maps: list[Tensor] = []
        for index, projection in enumerate(self):
            maps.append(projection(sources[index] if index < len(sources) else maps[-1]))
        return maps


def join_levels(
    maps: Sequence[Tensor],
    masks: Tensor | None,
    level_embed: Tensor,
    *,
    temperature: float = 10000.0,
    position_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Levels]:
    """Join feature maps to one sequence of tokens.

    Args:
        maps: ``[B, d, h, w]`` per level.
        masks: ``[B, H, W]`` bool, True on padding of the images; None if none is padded.
        level_embed: ``[levels, d]``, added to the positions of each level's tokens.
        temperature, position_offset: see ``image_position_embedding``.

    Returns:
        Tokens ``[B, S, d]``, positions ``[B or 1, S, d]``, and where the tokens lie.
    """
    dim, device = maps[0].shape[1], maps[0].device
    tokens, positions, paddings, ratios, centers = [], [], [], [], []
    for level, features in enumerate(maps):
        height, width = features.shape[-2:]
        if masks is None:
            padding = torch.zeros(1, height, width, dtype=torch.bool, device=device)
        else:
            padding = F.interpolate(masks[:, None].float(), size=(height, width))[:, 0].bool()
        position = image_position_embedding(padding, dim, temperature, features.dtype, offset=position_offset)
        # Images lie in the upper left corner, so that the first row and the first column tell their size.
        valid_width, valid_height = (~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)  # [B]
        x = (torch.arange(width, device=device) + 0.5) / valid_width[:, None]  # [B, w]
        y = (torch.arange(height, device=device) + 0.5) / valid_height[:, None]
        center = torch.stack((x[:, None].expand_as(padding), y[:, :, None].expand_as(padding)), dim=-1)
        tokens.append(features.flatten(2).transpose(1, 2))
        positions.append(position.flatten(1, 2) + level_embed[level])
        paddings.append(padding.flatten(1))
        ratios.append(torch.stack((valid_width / width, valid_height / height), dim=-1))
        centers.append(center.flatten(1, 2))
    levels = Levels(
        shapes=tuple(tuple(features.shape[-2:]) for features in maps),
        sizes=_sizes_on_device(maps),
        padding=None if masks is None else torch.cat(paddings, dim=1),
        valid_ratios=torch.stack(ratios, dim=1),
        centers=torch.cat(centers, dim=1),
    )
    return torch.cat(tokens, dim=1), torch.cat(positions, dim=1), levels


def _sizes_on_device(maps: Sequence[Tensor]) -> Tensor:
    """(width, height) of every map, ``[levels, 2]``, without a copy from the host, which would wait for the device."""
    sizes = [size for features in maps for size in (features.shape[-1], features.shape[-2])]
    filled = [torch.full((), size, dtype=torch.float32, device=maps[0].device) for size in sizes]
    return torch.stack(filled).view(-1, 2)
