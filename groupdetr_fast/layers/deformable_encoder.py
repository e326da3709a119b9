"""The encoder of Deformable DETR and of Mask2Former's pixel decoder: tokens of all levels attend to all levels."""

from torch import Tensor, nn

from .deformable_attention import MultiScaleDeformableAttention
from .deformable_levels import Levels
from .transformer_layer import TransformerLayer, relu_in_place

__all__ = ["DeformableEncoder", "DeformableEncoderLayer"]


class DeformableEncoderLayer(TransformerLayer):
    """Deformable self-attention and feed-forward block, each followed by dropout, residual and layer norm."""

    def __init__(
        self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, *, num_levels: int, num_points: int
    ):
        super().__init__()
        self.dropout = dropout
        self.self_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.activation = relu_in_place()
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, levels: Levels) -> Tensor:
        tokens = self.norm1(tokens + self._drop(self.self_attn(tokens + position, reference, tokens, levels)))
        return self.norm2(tokens + self._feed_forward(tokens))


class DeformableEncoder(nn.Module):
    """``num_layers`` encoder layers; the position embedding enters every layer."""

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        *,
        num_levels: int,
        num_points: int,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                dim, num_heads, dim_feedforward, dropout, num_levels=num_levels, num_points=num_points
            )
            for _ in range(num_layers)
        )

    def forward(self, tokens: Tensor, position: Tensor, levels: Levels) -> Tensor:
        """``tokens`` ``[B, S, d]``, ``position`` ``[B or 1, S, d]`` -> ``[B, S, d]``."""
        # Each token samples around its own place, at every level.
        reference = levels.centers[:, :, None] * levels.valid_ratios[:, None]  # [B or 1, S, levels, 2]
        for layer in self.layers:
            tokens = layer(tokens, position, reference, levels)
        return tokens
