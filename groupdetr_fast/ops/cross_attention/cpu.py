"""The CPU kernel of ``cross_attention``, built on torch's own CPU kernels.

Keys that are padding are left out: those that remain come first, in their order, and what some images have less than
others is hidden by a bias. Without dropout torch's fused kernel does the rest; dropout needs the probabilities, of
which a block exists at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._library import LIB, without_autocast
from ..grouped_attention.cpu import Part, Settings, explicit, explicit_backward

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Visible(NamedTuple):
    """The keys that are not padding, if any is.

    Attributes:
        rows: ``[B, N]`` int64, where they are, padded with other keys to the largest number N of an image.
        bias: ``[B, N]``, minus infinity on these others and else 0; None if there are none.
    """

    rows: Tensor
    bias: Tensor | None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    visible = _find_visible(padding, torch.promote_types(query.dtype, torch.float32))
    bias = None if visible is None else visible.bias
    key, value = (_take(tensor, visible) for tensor in (key, value))
    batch, length, heads, dim = query.shape
    if key.shape[1] == 0:
        lse = query.new_zeros(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
        return value.new_zeros(batch, length, heads, value.shape[3]), lse
    if not _uses_flash(query, key, value, seed):
        return explicit(query, key, value, _whole(query, key), Settings(dropout_p, seed, scale), bias)
    size = value.shape[3]
    tensors = (_heads_first(tensor, dim) for tensor in (query, key, value))
    out, lse = _flash(*tensors, attn_mask=_as_mask(bias, query.dtype), scale=scale)
    return out[..., :size].transpose(1, 2).contiguous(), lse.contiguous()


def backward(
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
    visible = _find_visible(padding, lse.dtype)
    bias = None if visible is None else visible.bias
    keys, values = (_take(tensor, visible) for tensor in (key, value))
    if keys.shape[1] == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    if _uses_flash(query, keys, values, seed):
        size, dim = value.shape[3], query.shape[3]
        tensors = (_heads_first(tensor, dim) for tensor in (grad_out, query, keys, values, out))
        grads = _flash_backward(*tensors, lse, 0.0, False, attn_mask=_as_mask(bias, query.dtype), scale=scale)
        of_query, of_keys, of_values = (grad.transpose(1, 2) for grad in grads)
        of_values = of_values[..., :size]
    else:
        settings = Settings(dropout_p, seed, scale)
        part = _whole(query, keys)
        of_query, of_keys, of_values = explicit_backward(grad_out, query, keys, values, out, lse, part, settings, bias)
    return of_query.contiguous(), _put_back(of_keys, key, visible), _put_back(of_values, value, visible)


def _find_visible(padding: Tensor | None, dtype: torch.dtype) -> _Visible | None:
    if padding is None or not padding.any():
        return None
    counts = (~padding).sum(1)
    most = int(counts.max()) if len(counts) else 0
    rows = padding.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    missing = torch.arange(most) >= counts[:, None]
    if not missing.any():
        return _Visible(rows, None)
    return _Visible(rows, torch.zeros(missing.shape, dtype=dtype).masked_fill_(missing, float("-inf")))


def _take(tensor: Tensor, visible: _Visible | None) -> Tensor:
    """``[B, S, H, D]`` to ``[B, N, H, D]``."""
    if visible is None:
        return tensor
    return tensor.gather(1, visible.rows[..., None, None].expand(-1, -1, *tensor.shape[2:]))


def _put_back(grad: Tensor, like: Tensor, visible: _Visible | None) -> Tensor:
    """The inverse of :func:`_take` for gradients: 0 on padding. Those of hidden keys are 0."""
    if visible is None:
        return grad.contiguous()
    return like.new_zeros(like.shape).scatter_(1, visible.rows[..., None, None].expand(grad.shape), grad)


def _uses_flash(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None) -> bool:
    return seed is None and value.shape[3] <= query.shape[3] and query.numel() > 0 and key.numel() > 0


def _heads_first(tensor: Tensor, dim: int) -> Tensor:
    """``[B, H, L, dim]``: torch's kernel wants heads of one size, and takes channels as adjacent without a check."""
    if tensor.shape[3] < dim:
        tensor = F.pad(tensor, (0, dim - tensor.shape[3]))
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)


def _as_mask(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[:, None, None].to(dtype)


def _whole(query: Tensor, key: Tensor) -> Part:
    return Part(1, 0, query.shape[1], 0, key.shape[1])


def register() -> None:
    """Register the kernels; the ops must have been defined."""
    LIB.impl("cross_attention", without_autocast(forward), "CPU")
    LIB.impl("cross_attention_backward", without_autocast(backward), "CPU")
