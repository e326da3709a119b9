"""What ``grouped_attention`` means, in plain PyTorch: softmax attention under the mask of the groups."""

import torch
from torch import Tensor

from ...groups import QueryGroups
from .._dropout import attention_dropout_reference
from .._reference import gradients


def grouped_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, layout: list[int], dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`groupdetr_fast.ops.grouped_attention`.

    Returns:
        The result ``[B, L, H, Dv]`` and the logarithm of the softmax's denominator, ``[B, H, L]``.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = QueryGroups.from_ints(layout).attention_mask(query.device)  # [L, L]
    scores = torch.einsum("bqhd,bkhd->bhqk", query.to(dtype), key.to(dtype)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    probabilities = scores.softmax(dim=-1)
    if seed is not None:
        origins = [number for image in range(query.shape[0]) for number in (image, 0, 0)]
        probabilities = attention_dropout_reference(probabilities, seed, dropout_p, origins)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, value.to(dtype))
    return out.to(query.dtype).contiguous(), scores.logsumexp(dim=-1)


def grouped_attention_backward_reference(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[int],
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; kernels use ``out`` and ``lse`` of forward, the reference does not."""

    def result(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return grouped_attention_reference(query, key, value, layout, dropout_p, seed, scale)[0]

    grad_query, grad_key, grad_value = gradients(result, grad_out, query, key, value)
    return grad_query, grad_key, grad_value
