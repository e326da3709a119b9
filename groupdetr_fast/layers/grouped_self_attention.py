"""Multi-head self-attention of decoder queries inside each group."""

from torch import Tensor, nn

from .. import ops
from ..groups import QueryGroups
from .attention import MultiheadProjections

__all__ = ["GroupedSelfAttention"]


class GroupedSelfAttention(MultiheadProjections):
    """Multi-head self-attention in which no group of queries sees another (Group DETR, section 3.2)."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__(dim, num_heads, dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, content: Tensor, position: Tensor, groups: QueryGroups) -> Tensor:
        """``content`` ``[B, L, d]``, ``position`` ``[B or 1, L, d]`` -> ``[B, L, d]``."""
        dropout_p = self.dropout if self.training else 0.0
        out = ops.grouped_attention(*self.self_attention_heads(content, position), groups, dropout_p=dropout_p)
        return self.out_proj(out.flatten(2))
