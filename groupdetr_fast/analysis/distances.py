"""How far apart the groups' queries are (section 3.3.2): perturbation distance and matching distance."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..losses.matcher import GroupMatcher, Matching
from ..models.detector import Detector

__all__ = ["DistanceRecorder", "matching_distance", "perturbation_distance", "query_positions"]

COLUMNS = ("step", "perturbation_distance", "matching_distance")


@torch.no_grad()
def query_positions(model: Detector) -> Tensor:
    """P(q) of equations 6 and 7: the learned reference points of all groups.

    Args:
        model: a detector whose queries have learned positions: of the paper's all but DINO and Mask2Former.

    Returns:
        ``[K, N, 2]``, x and y relative to the image.

    Raises:
        ValueError: if the model's queries have no learned positions.
    """
    positions = model.query_positions()
    if positions is None:
        raise ValueError(f"the queries of {type(model).__name__} have no learned positions")
    return positions.unflatten(0, (model.config.num_groups, model.config.num_queries))


def perturbation_distance(positions: Tensor) -> Tensor:
    """Equation 6: the mean distance from a query to the closest query of another group.

    With more than two groups, the mean over all pairs of groups.

    Args:
        positions: ``[K, N, 2]``, K at least 2.

    Returns:
        A scalar, in the unit of ``positions``.

    Raises:
        ValueError: for a single group.
    """
    num_groups, size, _ = positions.shape
    _check_groups(num_groups)
    points = positions.flatten(0, 1)
    distances = (points[:, None] - points).norm(dim=-1).unflatten(1, (num_groups, size))  # [K * N, K, N]
    closest = distances.amin(2).unflatten(0, (num_groups, size)).mean(1)  # [K, K]: from each group to each
    return (closest.sum() - closest.diagonal().sum()) / (num_groups * (num_groups - 1))


def matching_distance(positions: Tensor, matching: Matching) -> Tensor:
    """Equation 7: the mean distance between the queries of two groups that are matched with the same object.

    With more than two groups, the mean over all pairs of groups.

    Args:
        positions: ``[K, N, 2]``, K at least 2.
        matching: of one decoder layer, group by group, ``[B, K * T_max]``.

    Returns:
        A scalar, in the unit of ``positions``; nan if no object is matched in two groups.

    Raises:
        ValueError: for a single group.
    """
    num_groups = len(positions)
    _check_groups(num_groups)
    shape = (num_groups, matching.queries.shape[-1] // num_groups)
    matched = matching.matched.unflatten(-1, shape)  # [B, K, T]
    points = positions.flatten(0, 1)[matching.queries].unflatten(1, shape)  # [B, K, T, 2]
    first, second = torch.triu_indices(num_groups, num_groups, offset=1, device=points.device)
    distances = (points[:, first] - points[:, second]).norm(dim=-1)  # [B, pairs, T]
    return distances[matched[:, first] & matched[:, second]].mean()


class DistanceRecorder:
    """Appends both distances to a csv file during a training; an ``observe`` of ``training.engine.Trainer``.

    One layer of one batch is matched once more at every recorded step, which is all that it costs. Nothing is recorded
    of a batch without objects, nor of a model whose queries have no learned positions.

    Args:
        path: file to write; rows of steps that are trained again after a resume are replaced.
        matcher: matches the groups of the last decoder layer one-to-one.
        every: steps between two records; the first step is recorded too.
    """

    def __init__(self, path: Path, matcher: GroupMatcher, every: int):
        self.path = path
        self.matcher = matcher
        self.every = every
        self._begun = False

    def wants(self, step: int) -> bool:
        """Whether it is time to record; see ``Trainer``."""
        return step == 1 or step % self.every == 0

    def __call__(self, step: int, model: Any, output: Any, targets: Any) -> None:
        """Record, if it is time to: see ``Trainer``."""
        if not self._begun:
            self._begin(step)
        if not self.wants(step) or model.query_positions() is None or not any(targets.sizes):
            return
        positions = query_positions(model)
        matching = self.matcher(output.logits[-1].detach(), output.boxes[-1].detach(), targets, output.groups)
        distances = (perturbation_distance(positions).item(), matching_distance(positions, matching).item())
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow((step, *distances))

    def _begin(self, step: int) -> None:
        rows = [row for row in read_distances(self.path) if row["step"] < step]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._begun = True


def read_distances(path: Path) -> list[dict[str, float]]:
    """Rows of a file that :class:`DistanceRecorder` wrote; none if there is no file."""
    if not path.is_file():
        return []
    kinds: tuple[Callable[[str], float], ...] = (int, float, float)
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [{name: kind(row[name]) for name, kind in zip(COLUMNS, kinds, strict=True)} for row in rows]


def _check_groups(num_groups: int) -> None:
    if num_groups < 2:
        raise ValueError(f"distances between groups need at least 2 groups, got {num_groups}")
