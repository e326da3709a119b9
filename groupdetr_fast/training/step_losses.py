"""The losses of a step by name, in one tensor: to add, average or fetch all of them is one operation, not one each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from torch import Tensor

__all__ = ["Losses"]


@dataclass(frozen=True)
class Losses:
    """Losses by name; the sum of two has the names of both, since some steps lack some losses.

    Attributes:
        names: of the losses; none in the sum of nothing.
        values: ``[losses]``, detached.
    """

    names: tuple[str, ...] = ()
    values: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    @torch.no_grad()
    def of(cls, losses: Mapping[str, Tensor]) -> "Losses":
        """Take over losses of one device, scalars each."""
        return cls(tuple(losses), torch.stack(tuple(losses.values()))) if losses else cls()

    @classmethod
    def summed(cls, parts: Sequence[Mapping[str, Tensor]]) -> "Losses":
        """The sums of the losses of each name, of one part or more."""
        return reduce(add, map(cls.of, parts))

    def __add__(self, other: "Losses") -> "Losses":
        if not self.names:
            return other
        if not other.names:
            return self
        if self.names == other.names:
            return Losses(self.names, self.values + other.values)
        mine, others = self.by_name(), other.by_name()
        both = {name: mine[name] + others[name] for name in mine.keys() & others.keys()}
        return Losses.of({name: (mine | others | both)[name] for name in mine | others})

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.names.index(name)]

    def by_name(self) -> dict[str, Tensor]:
        """The losses as scalars, which share the memory of ``values``."""
        return dict(zip(self.names, self.values.unbind(), strict=True))
