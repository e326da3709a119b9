"""The pixel decoder of Mask2Former (section 3.2.2): a deformable encoder, and a finer map on top of it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .deformable_attention import initialize_deformable
from .deformable_encoder import DeformableEncoder
from .deformable_levels import InputProjections, join_levels, norm_groups

__all__ = ["PixelDecoder"]


class PixelDecoder(nn.Module):
    """Encodes all maps but the finest together, and adds the result to the finest one.

    The whole frame is image to it, padding included, as in the original repository. Levels are in its order, coarsest
    first.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        dim: channels of all maps that it returns.
        num_heads, num_layers, dim_feedforward, dropout: of the encoder.
        num_points: samples per head and level of its deformable attention.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int,
        num_heads: int,
        num_layers: int,
        dim_feedforward: int,
        dropout: float,
        *,
        num_points: int,
    ):
        super().__init__()
        finest, *others = in_channels
        self.input_proj = InputProjections(others[::-1], len(others), dim)
        self.level_embed = nn.Parameter(torch.randn(len(others), dim))
        self.encoder = DeformableEncoder(
            num_layers, dim, num_heads, dim_feedforward, dropout, num_levels=len(others), num_points=num_points
        )
        groups = norm_groups(dim)
        self.lateral = nn.Sequential(nn.Conv2d(finest, dim, 1, bias=False), nn.GroupNorm(groups, dim))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
        self.mask_features = nn.Conv2d(dim, dim, 1)
        initialize_deformable(self.encoder)
        for convolution in (self.lateral[0], self.smooth[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Decode.

        Args:
            features: ``[B, C, h, w]`` per map of the backbone, finest first.

        Returns:
            The encoded maps ``[B, d, h, w]``, coarsest first, and the mask features ``[B, d, h, w]`` of the finest.
        """
        finest, *others = features
        tokens, position, levels = join_levels(self.input_proj(others[::-1]), None, self.level_embed)
        encoded = self.encoder(tokens, position, levels)
        parts = encoded.split([height * width for height, width in levels.shapes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, levels.shapes, strict=True)]
        above = F.interpolate(maps[-1], size=finest.shape[-2:], mode="bilinear", align_corners=False)
        return maps, self.mask_features(self.smooth(self.lateral(finest) + above))
