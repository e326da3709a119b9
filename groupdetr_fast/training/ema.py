"""Exponential moving average of the weights."""

from collections import defaultdict
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
        model: the bare model; its weights are the first average. Its tensors may change their values but not be
            replaced: they are looked up once, since that takes as long as to launch the average of all of them.
        decay: in [0, 1), the share of the average that an update keeps.

    Attributes:
        updates: how many there were, an integer on the device of the weights.
        average: by the names of ``state_dict``, in the weights' own precision.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        state = model.state_dict(keep_vars=True)
        self.average = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.updates = torch.zeros((), dtype=torch.int64, device=next(iter(state.values())).device)
        pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, tensor in state.items():
            pairs[tensor.dtype].append((self.average[name], tensor))
        self._pairs = dict(pairs)

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
        taken = torch.ones_like(self.updates) if unless is None else (~unless).to(self.updates.dtype)
        share = share * taken
        self.updates += taken
        for dtype, pairs in self._pairs.items():
            averages, values = ([_numbers(own_part(pair[side])) for pair in pairs] for side in (0, 1))
            moves = torch._foreach_sub(values, averages)
            torch._foreach_mul_(moves, (share if dtype.is_floating_point else taken).to(moves[0].dtype))
            torch._foreach_add_(averages, moves)

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
        # FSDP drops whole weights that it has put together when it is asked for the state, and only then.
        for name, tensor in self.model.state_dict().items():
            weights = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(weights)


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor that can be subtracted; it shares its memory."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
