"""The decoder layer of Deformable DETR, with self-attention inside each group of queries."""

from torch import Tensor, nn

from ..groups import QueryGroups
from .deformable_attention import MultiScaleDeformableAttention
from .deformable_levels import Levels
from .grouped_self_attention import GroupedSelfAttention
from .transformer_layer import TransformerLayer, relu_in_place

__all__ = ["DeformableDecoderLayer", "boxes_in_levels"]


class DeformableDecoderLayer(TransformerLayer):
    """Grouped self-attention, deformable cross-attention and feed-forward block.

    ``norm2`` follows self-attention and ``norm1`` cross-attention, the names of the original repositories.
    """

    def __init__(
        self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, *, num_levels: int, num_points: int
    ):
        super().__init__()
        self.dropout = dropout
        self.self_attn = GroupedSelfAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.activation = relu_in_place()
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, content: Tensor, query_pos: Tensor, reference: Tensor, memory: Tensor, levels: Levels, groups: QueryGroups
    ) -> Tensor:
        """One layer.

        Args:
            content: ``[B, L, d]``.
            query_pos: ``[B or 1, L, d]``.
            reference: ``[B or 1, L, levels, 2 or 4]``, points or boxes in units of the padded maps.
            memory: ``[B, S, d]``, output of the encoder.
            levels: where the S tokens lie.
            groups: how the L queries fall into groups.

        Returns:
            ``[B, L, d]``.
        """
        content = self.norm2(content + self._drop(self.self_attn(content, query_pos, groups)))
        content = self.norm1(content + self._drop(self.cross_attn(content + query_pos, reference, memory, levels)))
        return self.norm3(content + self._feed_forward(content))


def boxes_in_levels(boxes: Tensor, levels: Levels) -> Tensor:
    """Boxes ``[B or 1, L, 4]`` in units of the unpadded image -> ``[B or 1, L, levels, 4]`` of each padded map."""
    return boxes[:, :, None] * levels.valid_ratios.repeat(1, 1, 2)[:, None]
