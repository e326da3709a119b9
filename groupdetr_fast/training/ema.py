"""Exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import own_part

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """A moving average of everything in a model's ``state_dict``; of integers, the last value.

    Early averages forget faster, so that the random weights of the beginning do not last: after ``n`` updates the decay
    is at most ``(1 + n) / (10 + n)``, as in TensorFlow's ``ExponentialMovingAverage``.

    Args:
        model: the bare model; its weights are the first average.
        decay: in [0, 1), the share of the average that an update keeps.

    Attributes:
        updates: how many there were.
        average: by the names of ``state_dict``, in the weights' own precision.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def restart(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Go on from an average that so many updates have made."""
        self.updates = updates
        self.average = {name: average[name].to(tensor, copy=True) for name, tensor in self.average.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = self.model.state_dict()
        moving = [name for name, tensor in state.items() if tensor.is_floating_point()]
        averages, weights = ([own_part(tensors[name]) for name in moving] for tensors in (self.average, state))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for name in state.keys() - set(moving):
            self.average[name].copy_(state[name])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model has the average as its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self.model.state_dict().items():
            weights = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(weights)
