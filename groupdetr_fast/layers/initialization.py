"""How the detectors of DETR's family initialise their transformers and their heads."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

__all__ = ["initialize_heads", "initialize_matrices"]

CLASS_PRIOR = 0.01  # probability that every class starts with (focal loss, section 4.1)


class LinearHead(Protocol):
    """A linear layer, plain or of groups."""

    weight: Tensor
    bias: Tensor


class PerceptronHead(Protocol):
    """A perceptron, plain or of groups."""

    layers: Sequence[LinearHead]


def initialize_matrices(*modules: nn.Module) -> None:
    """Initialise every parameter of at least two dimensions by Xavier's rule; biases and norms stay as they are."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def initialize_heads(class_heads: Iterable[LinearHead], box_heads: Iterable[PerceptronHead]) -> None:
    """Let class heads start at a low probability of every class, and box heads at no change of the boxes."""
    for class_head in class_heads:
        nn.init.constant_(class_head.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
    for box_head in box_heads:
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
