"""Parts of a model that are not trained, by the names of their parameters."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["freeze"]

WRAPPER = "model."  # what the names of models of transformers begin with, once or twice
NEAREST = 3  # names in a message


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters whose names match, and the statistics of the batch norms among them.

    A pattern is the name of a parameter or of a module, which stands for all that is in it, with ``*``, ``?`` and
    ``[...]`` as in file names: ``backbone``, ``encoder.layers.[01]``, ``*.bias``. The ``model.`` with which all names
    of a model of transformers begin may be left out. A batch norm whose parameters are frozen keeps its running mean
    and variance, and normalises by them, whatever mode the model is in.

    Args:
        model: the bare model; changed in place.
        patterns: at least one parameter must match each of them.

    Returns:
        The names of the parameters that match, in the model's order; some may have been frozen before.

    Raises:
        ValueError: if a pattern matches nothing, with the names that come nearest, or if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if _matches(name, pattern)}
        if not matching:
            raise ValueError(f"freeze: no parameter matches {pattern!r}{_nearest(pattern, names)}")
        frozen |= matching
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: {' '.join(patterns)} leave no parameter to train: name fewer parts")
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
            statistics = f"{prefix}.running_mean"  # of a norm without parameters, it alone says whose part the norm is
            if frozen.issuperset(own) if own else any(_matches(statistics, pattern) for pattern in patterns):
                _keep_in_eval_mode(module)
    return [name for name in names if name in frozen]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is that of a parameter or of a module that it is in."""
    ways = [name]
    while ways[-1].startswith(WRAPPER):
        ways.append(ways[-1].removeprefix(WRAPPER))
    return any(fnmatchcase(way, pattern) or fnmatchcase(way, f"{pattern}.*") for way in ways)


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The names of modules and parameters that are most like a pattern, as the end of a sentence."""
    known: dict[str, None] = {}
    for name in names:
        while name.startswith(WRAPPER):
            name = name.removeprefix(WRAPPER)
        parts = name.split(".")
        known |= dict.fromkeys(".".join(parts[: index + 1]) for index in range(len(parts)))
    close = difflib.get_close_matches(pattern.strip("*."), known, n=NEAREST)
    if close:
        return f": did you mean {', '.join(close)}?"
    return f"; the model's parts are {', '.join(name for name in known if '.' not in name)}"


def _keep_in_eval_mode(module: nn.Module) -> None:
    """Let ``train()``, of the module or of one around it, leave the module in evaluation mode."""
    module.eval()

    def stay(self: nn.Module, mode: bool = True) -> nn.Module:
        return self

    owner: Any = module
    owner.train = MethodType(stay, module)
