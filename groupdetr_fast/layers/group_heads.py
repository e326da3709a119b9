"""Layers of which every group of queries has one of its own, computed for all groups at once.

The tensors of the groups are stacked along the rows, group-major as learned queries are: with one group they are those
of the plain layer, and a checkpoint with one group gives the first rows.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GroupLayerNorm", "GroupLinear", "GroupMLP", "xavier_per_group"]


class GroupLinear(nn.Module):
    """``num_groups`` linear layers, initialised as ``torch.nn.Linear``.

    Attributes:
        weight: ``[num_groups * out_features, in_features]``.
        bias: ``[num_groups * out_features]``.
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int):
        super().__init__()
        self.num_groups = num_groups
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_groups * out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_groups * out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor, groups: slice) -> Tensor:
        """``[B, k, n, in_features]``, k being the number of the chosen ``groups`` -> ``[B, k, n, out_features]``."""
        weight = self.weight.unflatten(0, (self.num_groups, -1))[groups]
        bias = self.bias.unflatten(0, (self.num_groups, 1, -1))[groups]
        return torch.einsum("bkni,koi->bkno", x, weight) + bias


class GroupLayerNorm(nn.Module):
    """``num_groups`` layer norms.

    Attributes:
        weight, bias: ``[num_groups * dim]``.
    """

    def __init__(self, num_groups: int, dim: int):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(num_groups * dim))
        self.bias = nn.Parameter(torch.zeros(num_groups * dim))

    def forward(self, x: Tensor, groups: slice) -> Tensor:
        """``[B, k, n, dim]``, k being the number of the chosen ``groups`` -> the same shape."""
        weight = self.weight.unflatten(0, (self.num_groups, 1, -1))[groups]
        bias = self.bias.unflatten(0, (self.num_groups, 1, -1))[groups]
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


class GroupMLP(nn.Module):
    """``num_groups`` perceptrons of ``num_layers`` linear layers with ReLU between them."""

    def __init__(self, num_groups: int, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(GroupLinear(num_groups, a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor, groups: slice) -> Tensor:
        """``[B, k, n, input_dim]``, k being the number of the chosen ``groups`` -> ``[B, k, n, output_dim]``."""
        for layer in self.layers[:-1]:
            x = layer(x, groups).relu()
        return self.layers[-1](x, groups)


def xavier_per_group(weight: Tensor, num_groups: int) -> None:
    """Initialise each group's rows of a matrix as Xavier's rule does a matrix of that size."""
    for rows in weight.detach().unflatten(0, (num_groups, -1)):
        nn.init.xavier_uniform_(rows)
