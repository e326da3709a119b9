"""Multi-head self-attention of decoder queries inside each group."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..groups import QueryGroups
from .attention import split_heads

__all__ = ["GroupedSelfAttention"]


class GroupedSelfAttention(nn.Module):
    """Queries and keys carry the position, values do not; no group sees another (Group DETR, section 3.2).

    Parameters are named and laid out as in ``torch.nn.MultiheadAttention``.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, content: Tensor, position: Tensor, groups: QueryGroups) -> Tensor:
        """``content`` ``[B, L, d]``, ``position`` ``[B or 1, L, d]`` -> ``[B, L, d]``."""
        dim = content.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query, key = F.linear(content + position, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, -1)
        value = F.linear(content, weight[2 * dim :], bias[2 * dim :])
        heads = (split_heads(part, self.num_heads) for part in (query, key, value))
        out = ops.grouped_attention(*heads, groups, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.flatten(2))
