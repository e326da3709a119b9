"""Cross-attention in which every query sees its own part of the image (Mask2Former, section 3.2.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import split_heads

__all__ = ["MaskedCrossAttention", "visible_tokens"]


class MaskedCrossAttention(nn.Module):
    """Multi-head attention of queries to the image tokens that a mask leaves visible to each of them.

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attend.

        Args:
            query: ``[B, L, d]``, content plus position.
            key: ``[B, S, d]``, tokens plus position.
            value: ``[B, S, d]``, tokens.
            visible: ``[B, L, S]`` bool, at least one True in every row.

        Returns:
            ``[B, L, d]``.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = (
            split_heads(F.linear(x, weight, bias), self.num_heads).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        # One mask for all heads: it is broadcast, not repeated.
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=visible[:, None], dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def visible_tokens(mask_embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """The tokens inside the mask that each query predicts; all of them where the mask is empty.

    Args:
        mask_embeddings: ``[B, L, d]``.
        mask_features: ``[B, d, S]``, at the resolution of the tokens. Interpolating the features gives the same mask as
            interpolating the mask's logits, their product with the embeddings, since both are linear.

    Returns:
        ``[B, L, S]`` bool.
    """
    inside = mask_embeddings @ mask_features >= 0
    return inside | ~inside.any(-1, keepdim=True)
