"""The small perceptron of DETR's heads, and the inverse of the sigmoid that their boxes go through."""

import itertools

import torch
from torch import Tensor, nn

__all__ = ["ANCHOR_EPS", "MLP", "inverse_sigmoid"]

ANCHOR_EPS = 1e-3  # ``eps`` for boxes that a decoder refines, in the repositories of DAB-DETR, DN-DETR and DINO


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them: ``[..., input_dim]`` -> ``[..., output_dim]``."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """``log(x / (1 - x))`` with ``x`` clamped to [0, 1] and both terms of the quotient to at least ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
