"""Multi-scale deformable attention (Deformable DETR, section 4.1) as a module."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from .attention import split_heads
from .deformable_levels import Levels
from .initialization import initialize_matrices

__all__ = ["MultiScaleDeformableAttention", "initialize_deformable"]


class MultiScaleDeformableAttention(nn.Module):
    """Each query samples ``num_points`` values per head and level, at places and with weights that it predicts.

    Args:
        dim: size of queries and tokens, a multiple of ``num_heads``.
        num_levels: feature maps.
        num_points: samples per head and level.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let sample i of head h lie i + 1 units away in direction h of the compass, all with equal weight."""
        for module in (self.sampling_offsets, self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(module.bias)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angles.cos(), angles.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the square around the query
        distance = torch.arange(1, self.num_points + 1)
        bias = direction[:, None, None] * distance[:, None]  # [H, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, levels: Levels) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Lq, d]``, content plus position.
            reference: ``[B or 1, Lq, levels, 2]`` points ``(x, y)``, around which the samples lie by offsets in cells
                of each map; or ``[B or 1, Lq, levels, 4]`` boxes ``cxcywh``, whose size the offsets scale with. Both in
                units of the padded maps.
            tokens: ``[B, S, d]``; padded ones count as zero.
            levels: where the S tokens lie.

        Returns:
            ``[B, Lq, d]``.
        """
        value = self.value_proj(tokens)
        if levels.padding is not None:
            value = torch.where(levels.padding[..., None], 0, value)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1))
        # Half types resolve large maps no finer than a good part of a pixel.
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        center = self._for_points(reference[..., :2])
        if reference.shape[-1] == 2:
            unit = self._for_points(1 / levels.sizes)
        else:
            unit = self._for_points(reference[..., 2:] * (0.5 / self.num_points))
        locations = torch.addcmul(center, offsets, unit)  # [B, Lq, H, levels * P * 2]
        locations = locations.unflatten(-1, (self.num_levels, self.num_points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        return self.output_proj(
            ops.ms_deform_attn(split_heads(value, self.num_heads), levels.shapes, locations, weights)
        )

    def _for_points(self, x: Tensor) -> Tensor:
        """``[..., levels, 2]`` -> ``[..., 1, levels * P * 2]``, the same for every head and point.

        Repeated in memory, as CPUs multiply rows of two numbers an order of magnitude more slowly than long ones.
        """
        return x[..., None, :, None, :].expand(*x.shape[:-2], 1, -1, self.num_points, -1).flatten(-3)


def initialize_deformable(*modules: nn.Module) -> None:
    """Initialise as Deformable DETR does: every matrix by Xavier's rule, and then deformable attention by its own."""
    for root in modules:
        initialize_matrices(root)
        for module in root.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.reset_parameters()
