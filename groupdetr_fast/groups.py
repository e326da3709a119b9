"""How a sequence of decoder queries falls into groups and denoising segments.

This is the one definition of who may attend to whom. The reference mask, the CPU path and the GPU kernel of
``ops.grouped_attention`` all read it from here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["QueryGroups", "Segment", "rows_near_first_group"]

_SCOPES = ("first", "every")


class Segment(NamedTuple):
    """Queries ``[start, stop)`` that share their keys: one or two ranges ``(start, stop)``, ascending, disjoint."""

    start: int
    stop: int
    key_ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class QueryGroups:
    """The layout of one image's queries: denoising queries first, then ``num_groups`` groups, group-major.

    Without denoising, group ``g`` holds rows ``[g * N, (g + 1) * N)`` with ``N = queries_per_group`` and sees only
    itself (Group DETR, section 3.2). Denoising queries (DN-DETR, DINO) stand before the groups, set by set, denoising
    group by denoising group. A denoising group sees itself and the query group that its set belongs to; no query group
    sees any denoising query. With ``denoising_scope="first"`` there is one set, which belongs to group 0, as in the
    base models; with ``"every"`` each query group has a set of its own.

    Args:
        num_groups: K, number of query groups (at least 1).
        queries_per_group: N, queries of one group (at least 1).
        denoising_groups: number of denoising groups in one set; 0 for none.
        queries_per_denoising_group: queries of one denoising group; 0 only together with ``denoising_groups=0``.
        denoising_scope: ``"first"`` or ``"every"``.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for a size or a scope outside these ranges.
    """

    num_groups: int
    queries_per_group: int
    denoising_groups: int = 0
    queries_per_denoising_group: int = 0
    denoising_scope: str = "first"

    def __post_init__(self) -> None:
        for name in ("num_groups", "queries_per_group", "denoising_groups", "queries_per_denoising_group"):
            if isinstance(getattr(self, name), float | str):  # an int, numpy's, or one that is traced
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name in ("num_groups", "queries_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.denoising_groups, self.queries_per_denoising_group) < 0:
            raise ValueError("denoising_groups and queries_per_denoising_group must not be negative")
        if (self.denoising_groups == 0) != (self.queries_per_denoising_group == 0):
            raise ValueError(
                "denoising_groups and queries_per_denoising_group must be both zero or both positive, "
                f"got {self.denoising_groups} and {self.queries_per_denoising_group}"
            )
        if self.denoising_scope not in _SCOPES:
            raise ValueError(f"denoising_scope must be one of {_SCOPES}, got {self.denoising_scope!r}")

    @property
    def denoising_sets(self) -> int:
        """Number of denoising sets: 0, 1 (scope ``"first"``) or ``num_groups`` (scope ``"every"``)."""
        if self.denoising_groups == 0:
            return 0
        return 1 if self.denoising_scope == "first" else self.num_groups

    @property
    def denoising_length(self) -> int:
        """Number of denoising queries before the first group."""
        return self.denoising_sets * self.denoising_groups * self.queries_per_denoising_group

    @property
    def matching_length(self) -> int:
        """Number of matching queries, K * N."""
        return self.num_groups * self.queries_per_group

    @property
    def length(self) -> int:
        """Number of queries of one image, L."""
        return self.denoising_length + self.matching_length

    def group_range(self, group: int) -> tuple[int, int]:
        """Rows ``(start, stop)`` of query group ``group`` in the sequence."""
        if not 0 <= group < self.num_groups:
            raise ValueError(f"group must be in [0, {self.num_groups}), got {group}")
        start = self.denoising_length + group * self.queries_per_group
        return start, start + self.queries_per_group

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in the order of the sequence; together they hold every query exactly once."""
        segments = []
        size = self.queries_per_denoising_group
        for index in range(self.denoising_sets * self.denoising_groups):
            own = (index * size, (index + 1) * size)
            segments.append(Segment(*own, (own, self.group_range(index // self.denoising_groups))))
        for group in range(self.num_groups):
            own = self.group_range(group)
            segments.append(Segment(*own, (own,)))
        return tuple(segments)

    def attention_mask(self, device: torch.device | str | None = None) -> Tensor:
        """``[L, L]`` bool, True where the query (row) may attend to the key (column). For references and tests."""
        mask = torch.zeros(self.length, self.length, dtype=torch.bool, device=device)
        for start, stop, key_ranges in self.segments:
            for key_start, key_stop in key_ranges:
                mask[start:stop, key_start:key_stop] = True
        return mask

    def as_ints(self) -> list[int]:
        """The layout as five integers, the form in which it passes through operator schemas."""
        return [
            self.num_groups,
            self.queries_per_group,
            self.denoising_groups,
            self.queries_per_denoising_group,
            _SCOPES.index(self.denoising_scope),
        ]

    @classmethod
    def from_ints(cls, layout: list[int]) -> "QueryGroups":
        """The inverse of :meth:`as_ints`."""
        num_groups, queries_per_group, denoising_groups, queries_per_denoising_group, scope = layout
        return cls(num_groups, queries_per_group, denoising_groups, queries_per_denoising_group, _SCOPES[scope])


def rows_near_first_group(rows: Tensor, num_groups: int, noise: float, trained: int = 1) -> Tensor:
    """Group-major rows ``[K * N, ...]``, of which those after the first groups are now near those of group 0.

    Args:
        rows: of all groups.
        num_groups: K.
        noise: standard deviation of what is added, relative to that of the values of group 0.
        trained: groups, the first ones, that stay as they are.

    Raises:
        ValueError: if the noise is negative.
    """
    if not noise >= 0:  # which also refuses what is not a number
        raise ValueError(f"noise must not be negative, got {noise}")
    groups = rows.detach().unflatten(0, (num_groups, -1)).clone()
    first, others = groups[0], groups[trained:]
    if len(others):
        others.copy_(first + noise * first.std(correction=0) * torch.randn_like(others))
    return groups.flatten(0, 1)
