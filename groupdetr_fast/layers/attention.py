"""Attention over image tokens, shared by the encoder and the decoders, and what multi-head attention projects by."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops.cross_attention import is_preferred

__all__ = ["MultiheadProjections", "SelfAttention", "attend", "attend_under_mask", "split_heads"]

# By so many keys goes cuDNN's kernel, which torch asks first on compute capability 9.0 in half precision. Its gradient
# of a query is NaN under a mask, if half of the last ones are not there and all scores are very negative
# (pytorch/pytorch#196678).
_KEYS_OF_CUDNN = 128


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, L, d]`` -> ``[B, L, H, d / H]`` without a copy."""
    return x.unflatten(-1, (num_heads, -1))


def attend(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout_p: float) -> Tensor:
    """Attention of every query to every unpadded token.

    It is ``ops.cross_attention`` where that is preferred: on GPUs in half precision under a mask of padding, on CPUs
    with dropout. Else it is torch's own attention.

    Args:
        query: ``[B, L, H, D]``.
        key: ``[B, S, H, D]``.
        value: ``[B, S, H, Dv]``.
        padding: ``[B, S]`` bool, True on tokens that no query may see; None for no padding.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[B, L, H * Dv]``.
    """
    if is_preferred(query, value, padding, dropout_p):
        return ops.cross_attention(query, key, value, padding, dropout_p=dropout_p).flatten(2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if padding is None else ~padding[:, None, None, :]
    size = value.shape[-1]
    if value.device.type == "cpu" and dropout_p == 0 and size < key.shape[-1]:
        # torch's fused CPU kernel, which keeps no L x S weights for the backward pass, wants equal head sizes.
        value = F.pad(value, (0, key.shape[-1] - size))
    out = attend_under_mask(query, key, value, mask, dropout_p)
    return out[..., :size].transpose(1, 2).flatten(2)


def attend_under_mask(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, dropout_p: float) -> Tensor:
    """torch's attention, in such a way that a mask does not bring out cuDNN's fault.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, S, D]``.
        value: ``[B, H, S, Dv]``.
        visible: ``[..., S]`` bool, which broadcasts to ``[B, H, L, S]``, True where a query sees a token; None:
            everywhere.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[B, H, L, Dv]``.
    """
    if visible is not None and key.device.type == "cuda":
        key, value, visible = _fill_last_keys(key, value, visible)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout_p)


def _fill_last_keys(key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with half of :data:`_KEYS_OF_CUDNN` more keys, which no query sees, if just so many are missing."""
    half = _KEYS_OF_CUDNN // 2
    if key.shape[-2] % _KEYS_OF_CUDNN != half:
        return key, value, visible
    return F.pad(key, (0, 0, 0, half)), F.pad(value, (0, 0, 0, half)), F.pad(visible, (0, half))


class MultiheadProjections(nn.Module):
    """The projections of multi-head attention, named and laid out as in ``torch.nn.MultiheadAttention``.

    Biases are 0; ``in_proj_weight`` is left to whoever initialises the module.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def self_attention_heads(self, content: Tensor, position: Tensor) -> Iterator[Tensor]:
        """Queries, keys and values of self-attention, of which queries and keys carry the position.

        Args:
            content: ``[B, L, d]``.
            position: ``[B or 1, L, d]``.

        Returns:
            Three ``[B, L, H, D]``.
        """
        dim = content.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query, key = F.linear(content + position, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, -1)
        value = F.linear(content, weight[2 * dim :], bias[2 * dim :])
        return (split_heads(part, self.num_heads) for part in (query, key, value))


class SelfAttention(MultiheadProjections):
    """Multi-head self-attention of image tokens."""

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """``x``, ``position`` ``[B, S, d]``, ``padding`` ``[B, S]`` -> ``[B, S, d]``."""
        dropout_p = self.dropout if self.training else 0.0
        return self.out_proj(attend(*self.self_attention_heads(x, position), padding, dropout_p))
