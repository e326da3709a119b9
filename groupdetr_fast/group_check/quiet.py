"""A model as the check needs it: in training mode without chance and batch statistics, all of which is undone."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..random_state import random_state_kept

__all__ = ["Modes", "own_chance", "quiet"]

_PATH = re.compile("DropPath|StochasticDepth|DropBlock|DropLayer")
_SEED = 1
_REDRAWN = 0.02  # standard deviation of what takes the place of zeros


@dataclass
class Modes:
    """The modes of a model during the check.

    Attributes:
        model: the model.
        batch_norms: those of its modules that take statistics of the batch in training.
        dropouts: number of its modules with dropout.
        redrawn: names of its parameters that were all zero.
    """

    model: nn.Module
    batch_norms: Sequence[nn.Module]
    dropouts: int
    redrawn: list[str]

    def training(self, *, batch_statistics: bool = False) -> None:
        """Training mode without dropout; batch norms use their running statistics unless ``batch_statistics``."""
        self.model.train()
        for module in self.model.modules():
            if _is_dropout(module):
                module.eval()
        for module in self.batch_norms:
            module.train(batch_statistics)

    def evaluation(self) -> None:
        """Evaluation mode."""
        self.model.eval()


@contextmanager
def own_chance(seed: int) -> Iterator[None]:
    """Draw from generators in a state of one's own; on leaving, they are as before."""
    with random_state_kept():
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[Modes]:
    """Take over a model; on leaving, its modes, parameters and buffers and all states of chance are as before.

    Parameters that are all zero are drawn anew meanwhile: nothing shows on the other side of a layer of zeros, with
    which many heads and gates start. Every parameter takes gradients.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    rates = [(each, name, value) for each in modules for name, value in vars(each).items() if _is_rate(name, value)]
    zeros: dict[str, nn.Parameter] = {}
    with own_chance(_SEED):
        try:
            for module, name, _ in rates:
                setattr(module, name, 0.0)
            for name, parameter in model.named_parameters():
                if not parameter.is_floating_point():
                    continue
                parameter.requires_grad_(True)
                if parameter.numel() and not parameter.detach().any():
                    zeros[name] = parameter
                    nn.init.normal_(parameter, std=_REDRAWN)
            norms = [module for module in modules if isinstance(module, _BatchNorm)]
            dropouts = {id(module) for module, *_ in rates}
            dropouts |= {id(each) for each in modules if isinstance(each, _DropoutNd) and each.p > 0}
            yield Modes(model, norms, len(dropouts), list(zeros))
        finally:
            for module, name, value in rates:
                setattr(module, name, value)
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
            with torch.no_grad():
                for parameter in zeros.values():
                    parameter.zero_()
                for name, buffer in model.named_buffers():
                    if name in state:
                        buffer.copy_(state[name])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(needed[name])


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or _PATH.search(type(module).__name__) is not None


def _is_rate(name: str, value: object) -> bool:
    """Whether an attribute of a module is a probability of dropout, as ``MultiheadAttention.dropout`` is."""
    return isinstance(value, float) and "drop" in name.lower() and value != 0
