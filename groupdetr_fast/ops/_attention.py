"""What the two attentions share beside their kernels: checks, what is left to them to choose, and fakes."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_DIM", "check_kinds", "fake", "fake_backward", "settled"]

MAX_DIM = 128  # channels of a head that the GPU kernels can do
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_kinds(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless the query has four dimensions, and all have one dtype that attention takes and one device."""
    if query.dtype not in _DTYPES:
        raise TypeError(f"query must be float32, float64, float16 or bfloat16, got {query.dtype}")
    if query.dim() != 4:
        raise ValueError(f"query must have shape [B, L, H, D], got {list(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must lie on the device of query, {query.device}, got {tensor.device}")


def settled(query: Tensor, dropout_p: float, scale: float | None) -> tuple[float, float]:
    """Probability of dropout and scale, as the ops take them.

    Raises:
        ValueError: if the probability is not one.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is None:
        scale = max(query.shape[3], 1) ** -0.5
    return float(dropout_p), float(scale)


def fake(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """The fake kernel: the result and the log-sum-exp of each query."""
    batch, length, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(batch, length, heads, value.shape[3])
    return out, query.new_empty(batch, heads, length, dtype=dtype)


def fake_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The fake kernel of the backward pass."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
