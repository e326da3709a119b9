"""``cross_attention`` of an inference graph in standard operators, for formats that know no others, such as ONNX."""

import torch
from torch import Tensor

__all__ = ["attend_by_products"]


def attend_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``cross_attention`` where nothing is dropped."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if padding is None:
        return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)
    hidden = padding[:, None, None]
    # Not minus infinity, of which the softmax of an image that is all padding would make NaN.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1).masked_fill(hidden, 0.0)
    return (probabilities @ value).transpose(1, 2), scores.logsumexp(-1)
