"""What the ways of naming tensors have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..detector import Detector

__all__ = ["CheckpointMismatch", "Converted", "Layout", "StateDict", "gather"]

StateDict = dict[str, Tensor]


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit the model; the message says where.

    Attributes:
        classes: rows of the class head in the checkpoint and in the model, where it is that which does not fit.
    """

    def __init__(self, message: str, classes: tuple[int, int] | None = None):
        super().__init__(message)
        self.classes = classes


@dataclass
class Converted:
    """The tensors of a checkpoint, sorted by the names of a model.

    Attributes:
        tensors: by name in the model; names that the checkpoint lacks are left out.
        keys: in the checkpoint, by name in the model.
        unused: keys of the checkpoint that have no place in the model.
        repeated: keys of the checkpoint that hold a tensor of another key once more.
    """

    tensors: StateDict = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors.

    Attributes:
        name: for messages.
        marker: a pattern that some key of this layout, and no key of the others, matches at its start.
        convert: sorts a checkpoint by the names of a model; may raise :class:`CheckpointMismatch`.
    """

    name: str
    marker: str
    convert: Callable[[StateDict, Detector], Converted]


def gather(sources: Mapping[str, list[str]], state: StateDict) -> Converted:
    """Sort a checkpoint in which several keys may hold one tensor.

    Args:
        sources: name in the model -> the keys of its tensor, at least one.
        state: key -> tensor.

    Raises:
        CheckpointMismatch: if two keys of a name hold different tensors.
    """
    converted = Converted()
    for name, (first, *others) in sources.items():
        for key in others:
            if not torch.equal(state[key], state[first]):
                raise CheckpointMismatch(
                    f"{first} and {key} differ in the checkpoint, but are one tensor in the model, {name}"
                )
        converted.tensors[name] = state[first]
        converted.keys[name] = first
        converted.repeated += others
    used = {key for keys in sources.values() for key in keys}
    converted.unused = [key for key in state if key not in used]
    return converted
