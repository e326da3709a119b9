"""``grouped_attention`` of an inference graph in standard operators, for formats that know no others, such as ONNX."""

from torch import Tensor

__all__ = ["attend_in_one_group"]


def attend_in_one_group(
    query: Tensor, key: Tensor, value: Tensor, layout: list[int], dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``grouped_attention`` where all queries are one group and nothing is dropped."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query * scale @ key.transpose(-1, -2)  # in this order, which float16 has the range for
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)
