"""What ``cross_attention`` means, in plain PyTorch: softmax attention over the keys that are not padding."""

import torch
from torch import Tensor

from .._dropout import keep_mask
from .._reference import gradients


def cross_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`groupdetr_fast.ops.cross_attention`.

    Returns:
        The result ``[B, L, H, Dv]`` and the logarithm of the softmax's denominator, ``[B, H, L]``; the latter is 0
        where all keys are padding.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if padding is None:
        padding = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
    # Whatever padding holds, also NaN, is not seen.
    key = key.masked_fill(padding[..., None, None], 0.0)
    value = value.masked_fill(padding[..., None, None], 0.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.to(dtype), key.to(dtype)) * scale
    scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    sees_nothing = padding.all(1)[:, None, None]
    probabilities = scores.softmax(dim=-1).masked_fill(sees_nothing[..., None], 0.0)
    if seed is not None:
        keep = keep_mask(seed, dropout_p, *_places(probabilities, padding))
        probabilities = torch.where(keep, probabilities * (1 / (1 - dropout_p)), 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, value.to(dtype))
    lse = scores.logsumexp(dim=-1).masked_fill(sees_nothing, 0.0)
    return out.to(query.dtype).contiguous(), lse


def _places(probabilities: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head, row and column of each probability ``[B, H, L, S]`` as dropout counts them: columns without padding."""
    images, heads, rows, _ = probabilities.shape
    device = probabilities.device
    head = torch.arange(images * heads, device=device).view(images, heads, 1, 1)
    column = ((~padding).cumsum(1) - 1).clamp(min=0)  # of padding itself, whose probabilities are 0, any number
    return head, torch.arange(rows, device=device)[:, None], column[:, None, None]


def cross_attention_backward_reference(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; kernels use ``out`` and ``lse`` of forward, the reference does not."""

    def result(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cross_attention_reference(query, key, value, padding, dropout_p, seed, scale)[0]

    grad_query, grad_key, grad_value = gradients(result, grad_out, query, key, value)
    return grad_query, grad_key, grad_value
