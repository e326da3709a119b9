"""How the detectors of DETR's family initialise their transformers and their heads."""

import math
from collections.abc import Iterable

from torch import nn

__all__ = ["initialize_heads", "initialize_matrices"]

CLASS_PRIOR = 0.01  # probability that every class starts with (focal loss, section 4.1)


def initialize_matrices(*modules: nn.Module) -> None:
    """Initialise every parameter of at least two dimensions by Xavier's rule; biases and norms stay as they are."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def initialize_heads(class_heads: Iterable[nn.Module], box_heads: Iterable[nn.Module]) -> None:
    """Let class heads start at a low probability of every class, and box heads at no change of the boxes.

    Args:
        class_heads: linear layers, plain or of groups.
        box_heads: perceptrons, plain or of groups.
    """
    for class_head in class_heads:
        nn.init.constant_(class_head.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
    for box_head in box_heads:
        last = list(box_head.get_submodule("layers").children())[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
