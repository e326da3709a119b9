"""The decoder layer of Conditional DETR, with self-attention inside each group of queries."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..groups import QueryGroups
from .attention import attend, split_heads
from .transformer_layer import TransformerLayer, relu_in_place

__all__ = ["ConditionalDecoderLayer", "Memory"]


class Memory(NamedTuple):
    """What the decoder sees of the image, one row per token."""

    tokens: Tensor  # [B, S, d], output of the encoder
    position: Tensor  # [B, S, d]
    padding: Tensor | None  # [B, S] bool, True on padding


class _OutProjection(nn.Module):
    """Holds the output projection of an attention whose input projections belong to the layer, under DETR's name."""

    def __init__(self, dim: int):
        super().__init__()
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)


class ConditionalDecoderLayer(TransformerLayer):
    """Grouped self-attention, conditional cross-attention and feed-forward block (Conditional DETR, section 3.3).

    Cross-attention adds the dot product of two spatial embeddings to that of the contents, by concatenating content and
    position inside each head. The first layer also adds the projected query position to the content.

    Args:
        first: whether this is the decoder's first layer.
        activation: of the feed-forward block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        *,
        first: bool,
        activation: Callable[[], nn.Module] = relu_in_place,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = _OutProjection(dim)
        self.norm1 = nn.LayerNorm(dim)

        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_proj = nn.Linear(dim, dim) if first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        self.cross_attn = _OutProjection(dim)
        self.norm2 = nn.LayerNorm(dim)

        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.activation = activation()
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, content: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Memory, groups: QueryGroups
    ) -> Tensor:
        """One layer.

        Args:
            content: ``[B, L, d]``.
            query_pos: ``[B or 1, L, d]``, learned position of the queries.
            query_sine: ``[B or 1, L, d]``, sine embedding of the reference points, scaled for this layer.
            memory: the image.
            groups: how the L queries fall into groups.

        Returns:
            ``[B, L, d]``.
        """
        content = self.norm1(content + self._drop(self._attend_in_groups(content, query_pos, groups)))
        content = self.norm2(content + self._drop(self._attend_to_image(content, query_pos, query_sine, memory)))
        return self.norm3(content + self._feed_forward(content))

    def _attend_in_groups(self, content: Tensor, query_pos: Tensor, groups: QueryGroups) -> Tensor:
        query = self.sa_qcontent_proj(content) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(content) + self.sa_kpos_proj(query_pos)
        heads = (split_heads(part, self.num_heads) for part in (query, key, self.sa_v_proj(content)))
        out = ops.grouped_attention(*heads, groups, dropout_p=self.dropout if self.training else 0.0)
        return self.self_attn.out_proj(out.flatten(2))

    def _attend_to_image(self, content: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Memory) -> Tensor:
        query, key = self.ca_qcontent_proj(content), self.ca_kcontent_proj(memory.tokens)
        key_sine = self.ca_kpos_proj(memory.position).expand_as(key)
        if self.ca_qpos_proj is not None:
            query = query + self.ca_qpos_proj(query_pos)
            key = key + key_sine
        query_sine = self.ca_qpos_sine_proj(query_sine).expand_as(query)
        out = attend(
            self._join_in_heads(query, query_sine),
            self._join_in_heads(key, key_sine),
            split_heads(self.ca_v_proj(memory.tokens), self.num_heads),
            memory.padding,
            self.dropout if self.training else 0.0,
        )
        return self.cross_attn.out_proj(out)

    def _join_in_heads(self, content: Tensor, position: Tensor) -> Tensor:
        """Two ``[B, L, d]`` -> ``[B, L, H, 2 d / H]``: each head holds its content, then its position."""
        return torch.cat((split_heads(content, self.num_heads), split_heads(position, self.num_heads)), dim=-1)
