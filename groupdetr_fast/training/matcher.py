"""One-to-one matching of every group of queries to the ground truth (Group DETR, section 3.2, equations 2 and 3)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..groups import QueryGroups
from ..targets import PackedTargets

__all__ = ["GroupMatcher", "Matching"]


class Matching(NamedTuple):
    """Which query each target got, in every layer, image and group.

    Attributes:
        queries: ``[..., B, K * T_max]`` int64, row of the matched query among the K * N, 0 where there is none;
            group-major, as the queries are.
        matched: ``[..., B, K * T_max]`` bool, False on padding and on targets left over because N is smaller.
    """

    queries: Tensor
    matched: Tensor


@dataclass(frozen=True)
class GroupMatcher:
    """Matches all layers, images and groups in one call of each op, without a host synchronisation.

    Args:
        class_cost, l1_cost, giou_cost: weights of the three parts of the cost.
        alpha, gamma: of the focal class cost.
    """

    class_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: PackedTargets, groups: QueryGroups) -> Matching:
        """Match.

        Args:
            logits: ``[..., B, K * N, C]``.
            boxes: ``[..., B, K * N, 4]`` ``cxcywh`` in [0, 1].
            targets: of the B images.
            groups: how the K * N queries fall into groups.

        Raises:
            ValueError: if the number of queries is not K * N.
        """
        num_groups, size = groups.num_groups, groups.queries_per_group
        if logits.shape[-2] != groups.matching_length:
            raise ValueError(
                f"logits must have {num_groups} * {size} = {groups.matching_length} queries in dimension -2, "
                f"got {list(logits.shape)}"
            )
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
        per_group = cost.unflatten(-1, (num_groups, size)).movedim(-2, -3)  # [..., B, K, T, N], a view
        index = ops.linear_assignment(per_group, targets.num_targets[:, None])  # [..., B, K, T]
        offset = torch.arange(num_groups, device=index.device)[:, None] * size
        matched = index >= 0
        queries = torch.where(matched, index + offset, 0)
        return Matching(queries.flatten(-2), matched.flatten(-2))
