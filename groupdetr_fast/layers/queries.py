"""Which groups of learned queries take part in a forward pass."""

from torch import Tensor

from ..groups import QueryGroups

__all__ = ["choose_groups", "group_rows"]


def choose_groups(
    total_groups: int, queries_per_group: int, training: bool, num_groups: int | None, inference_group: int
) -> tuple[QueryGroups, int]:
    """The layout of a forward pass and the first group that it uses.

    All groups are used in training and one in evaluation, unless ``num_groups`` says otherwise: then the groups
    ``0 ... num_groups - 1`` are used. A single group is ``inference_group``.

    Raises:
        ValueError: if ``num_groups`` or ``inference_group`` is out of range.
    """
    if num_groups is None:
        num_groups = total_groups if training else 1
    if not 1 <= num_groups <= total_groups:
        raise ValueError(f"num_groups must be in [1, {total_groups}], the groups this model has; got {num_groups}")
    if not 0 <= inference_group < total_groups:
        raise ValueError(f"inference_group must be in [0, {total_groups}), got {inference_group}")
    first = inference_group if num_groups == 1 else 0
    return QueryGroups(num_groups, queries_per_group), first


def group_rows(weight: Tensor, groups: QueryGroups, first: int) -> Tensor:
    """Rows of a group-major embedding ``[K_total * N, d]`` that belong to the chosen groups, ``[1, K * N, d]``."""
    start = first * groups.queries_per_group
    return weight[None, start : start + groups.matching_length]
