"""One-to-one matching of every group of queries to the ground truth (Group DETR, section 3.2, equations 2 and 3).

Also the two assignments that the paper compares it with in figure 1 and table 7.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import ops
from ..groups import QueryGroups
from ..targets import PackedTargets

__all__ = ["Assignment", "GroupMatcher", "Matching", "check_length", "match_groups"]

Assignment = Literal["group", "one_to_one", "one_to_many"]


class Matching(NamedTuple):
    """Which query each target got, in every layer, image and group; K is the number of queries that each target got.

    Attributes:
        queries: ``[..., B, K * T_max]`` int64, row of the matched query among the K * N, 0 where there is none;
            group-major, as the queries are.
        matched: ``[..., B, K * T_max]`` bool, False on padding and on targets left over because N is smaller.
        positives: K.
    """

    queries: Tensor
    matched: Tensor
    positives: int

    def classes(self, targets: PackedTargets, num_queries: int, unmatched: int) -> Tensor:
        """The class that each of ``num_queries`` queries must predict.

        Returns:
            ``[..., B, num_queries]`` int64: the label of the query's target, or ``unmatched``.
        """
        labels = targets.labels.repeat(1, self.positives)  # [B, K * T_max]
        classes = self.queries.new_full((*self.queries.shape[:-1], num_queries), unmatched)
        return classes.scatter_add(-1, self.queries, (labels - unmatched).where(self.matched, 0))


@dataclass(frozen=True)
class GroupMatcher:
    """Matches all layers, images and groups in one call of each op, without a host synchronisation.

    Args:
        class_cost, l1_cost, giou_cost: weights of the three parts of the cost.
        alpha, gamma: of the focal class cost.
        assignment: "group" splits the queries into ``positives`` equal parts and matches each part one-to-one (Group
            DETR); "one_to_one" matches all queries together one-to-one (DETR); "one_to_many" matches all queries
            together, with every target repeated ``positives`` times (the naive one-to-many of figure 1).
        positives: queries that each target gets; None for as many as the model has groups, or 1 with "one_to_one".
            It may differ from the number of groups inside which the decoder attends, as in table 7.

    Raises:
        ValueError: for an unknown assignment, or a number of positives that it cannot have.
    """

    class_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    assignment: Assignment = "group"
    positives: int | None = None

    def __post_init__(self) -> None:
        if self.assignment not in get_args(Assignment):
            raise ValueError(f"assignment must be one of {get_args(Assignment)}, got {self.assignment!r}")
        if self.positives is not None and self.positives < 1:
            raise ValueError(f"positives must be at least 1, got {self.positives}")
        if self.assignment == "one_to_one" and self.positives not in (None, 1):
            raise ValueError(f'assignment "one_to_one" gives each target one query, got positives={self.positives}')

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: PackedTargets, groups: QueryGroups) -> Matching:
        """Match.

        Args:
            logits: ``[..., B, K * N, C]``.
            boxes: ``[..., B, K * N, 4]`` ``cxcywh`` in [0, 1].
            targets: of the B images.
            groups: how the K * N queries fall into groups.

        Raises:
            ValueError: if the number of queries is not K * N, or cannot be split into ``positives`` parts.
        """
        check_length(logits, groups)
        parts, repeats = self._plan(groups)
        cost = ops.matching_cost(
            logits,
            boxes,
            targets,
            class_weight=self.class_cost,
            l1_weight=self.l1_cost,
            giou_weight=self.giou_cost,
            alpha=self.alpha,
            gamma=self.gamma,
        )
        return match_groups(cost, targets, parts, repeats)

    def _plan(self, groups: QueryGroups) -> tuple[QueryGroups, int]:
        """The parts of the queries that are matched on their own, and how often each target is repeated in each."""
        length = groups.matching_length
        if self.assignment == "one_to_one":
            return QueryGroups(1, length), 1
        positives = self.positives or groups.num_groups
        if self.assignment == "one_to_many":
            return QueryGroups(1, length), positives
        if length % positives:
            raise ValueError(f"{length} queries cannot be split into positives={positives} equal groups")
        return QueryGroups(positives, length // positives), 1


def check_length(logits: Tensor, groups: QueryGroups) -> None:
    """Check that ``logits`` ``[..., Q, C]`` are those of K * N queries.

    Raises:
        ValueError: if they are not.
    """
    num_groups, size = groups.num_groups, groups.queries_per_group
    if logits.shape[-2] != groups.matching_length:
        raise ValueError(
            f"logits must have {num_groups} * {size} = {groups.matching_length} queries in dimension -2, "
            f"got {list(logits.shape)}"
        )


def match_groups(cost: Tensor, targets: PackedTargets, groups: QueryGroups, repeats: int = 1) -> Matching:
    """Match each group one-to-one to the targets; all problems are solved in one call.

    Args:
        cost: ``[..., B, T_max, G * N]``.
        targets: of the B images.
        groups: how the queries fall into groups that are matched on their own.
        repeats: how often each group's problem has every target, each time for another query.

    Returns:
        The matching, with G * repeats queries for each target, unless a group has fewer queries than its problem rows.
    """
    num_groups, size = groups.num_groups, groups.queries_per_group
    per_group = cost.unflatten(-1, (num_groups, size)).movedim(-2, -3)  # [..., B, G, T, N], a view
    if repeats > 1:  # the copies of a target side by side, so that padding stays last
        per_group = per_group.repeat_interleave(repeats, dim=-2)
    index = ops.linear_assignment(per_group, targets.num_targets[:, None] * repeats)  # [..., B, G, T * repeats]
    index = index.unflatten(-1, (targets.max_targets, repeats)).mT  # [..., B, G, repeats, T]
    offset = torch.arange(num_groups, device=index.device)[:, None, None] * size
    matched = index >= 0
    queries = torch.where(matched, index + offset, 0)
    return Matching(queries.flatten(-3), matched.flatten(-3), num_groups * repeats)
