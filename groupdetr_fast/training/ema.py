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
        updates: how many there were, an integer on the device of the weights.
        average: by the names of ``state_dict``, in the weights' own precision.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        device = next(iter(self.average.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def restart(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Go on from an average that so many updates have made."""
        self.updates.fill_(updates)  # in place, as all that follows: CUDA graphs know tensors by their memory
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @torch.no_grad()
    def update(self, unless: Tensor | None = None) -> None:
        """Move the average towards the model's weights; the host neither decides nor waits.

        Args:
            unless: scalar bool; where it is true, nothing changes. The weights must be finite all the same.
        """
        # 1 - min(decay, (1 + n) / (10 + n)), in a form that float32 holds precisely
        share = (9 / (10 + self.updates)).clamp(min=1 - self.decay)
        if unless is not None:
            share = share.where(~unless, 0)
        self.updates += 1 if unless is None else ~unless
        state = self.model.state_dict()
        moving = [name for name, tensor in state.items() if tensor.is_floating_point()]
        averages, weights = ([own_part(tensors[name]) for name in moving] for tensors in (self.average, state))
        moves = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(moves, share.to(moves[0].dtype))
        torch._foreach_add_(averages, moves)
        for name in state.keys() - set(moving):
            value = state[name] if unless is None else torch.where(unless, self.average[name], state[name])
            self.average[name].copy_(value)

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
