"""Loading a checkpoint into a model with any number of groups."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .layouts import LAYOUTS, recognize
from .read import CheckpointFile, read_checkpoint

__all__ = ["CheckpointMismatch", "LoadReport", "load_checkpoint"]

logger = logging.getLogger(__name__)

CLASS_HEADS = ("class_embed.",)


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit the model; the message says where."""


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        layout: the code base whose names the checkpoint has.
        matched: names, in the model, of the tensors that were loaded.
        missing: names in the model that the checkpoint does not have; they keep their values.
        dropped: keys of the checkpoint that have no place in the model.
        groups: (in the checkpoint, in the model) numbers of groups.
    """

    layout: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    groups: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        text = f"{len(self.matched)} tensors loaded from a checkpoint of {self.layout}"
        if self.groups[0] != self.groups[1]:
            text += f"; {self.groups[0]} groups in the checkpoint, {self.groups[1]} in the model"
        for kind in ("missing", "dropped"):
            names = getattr(self, kind)
            if names:
                text += f"; {len(names)} {kind}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        return text


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    num_groups: int | None = None,
    new_class_head: bool = False,
) -> LoadReport:
    """Load weights into a detector of this package.

    Recognised are this package's files, those of the original repositories, and transformers' (a directory, a file or a
    state dict; the names of transformers 4 and 5). Learned queries are regrouped: if the model has more groups than the
    checkpoint, the others keep their fresh initialisation (copies of group 0 would stay copies); if it has fewer, the
    first groups are taken; fewer queries per group are taken from each group.

    Args:
        model: the detector; changed only if everything fits.
        path_or_state_dict: a file, a folder or a state dict.
        num_groups: groups in the checkpoint, where it does not say and its queries are not those of one group.
        new_class_head: keep the model's fresh class head where the number of classes differs.

    Returns:
        A report, which is also logged.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        CheckpointMismatch: if a tensor does not fit or the layout is unknown; the message names it.
        ValueError: if the file cannot be read.
    """
    file = read_checkpoint(path_or_state_dict)
    layout = recognize(file.state)
    if layout is None:
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise CheckpointMismatch(
            f"the checkpoint's tensor names (such as {next(iter(file.state))}) are those of none of: {known}"
        )
    state = layout.convert(file.state)
    target = model.state_dict()
    report = LoadReport(layout.name)
    accepted: dict[str, Tensor] = {}
    for name, current in target.items():
        if name not in state:
            if not name.endswith("num_batches_tracked"):
                report.missing.append(name)
            continue
        loaded = state[name]
        if name in model.group_parameters:
            loaded, report.groups = _regroup(name, loaded, current, model, file, num_groups)
        if new_class_head and name.startswith(CLASS_HEADS) and loaded.shape != current.shape:
            report.missing.append(name)
            report.dropped.append(name)
            continue
        if loaded.shape != current.shape:
            hint = " (pass new_class_head=True to train a new one)" if name.startswith(CLASS_HEADS) else ""
            raise CheckpointMismatch(
                f"{name} has shape {list(loaded.shape)} in the checkpoint and {list(current.shape)} in the model{hint}"
            )
        accepted[name] = loaded
    if not accepted:
        raise CheckpointMismatch("no tensor of the checkpoint belongs to the model")
    model.load_state_dict(accepted, strict=False)
    report.matched = list(accepted)
    report.dropped += [key for key in state if key not in target and not key.endswith("num_batches_tracked")]
    logger.log(logging.WARNING if report.missing else logging.INFO, "%s", report)
    return report


def _regroup(
    name: str, loaded: Tensor, current: Tensor, model: nn.Module, file: CheckpointFile, num_groups: int | None
) -> tuple[Tensor, tuple[int, int]]:
    """Fit group-major rows ``[K * N, C]`` of a checkpoint to the model's. Returns also both numbers of groups."""
    rows, queries = len(loaded), model.config.num_queries
    groups = num_groups or file.num_groups
    if groups is None and file.num_queries and rows % file.num_queries == 0:
        groups = rows // file.num_queries
    if groups is None and rows in (queries, len(current)):
        groups = rows // queries
    if groups is None:
        raise CheckpointMismatch(
            f"{name} has {rows} rows in the checkpoint, neither one group of {queries} queries nor the model's "
            f"{model.config.num_groups} * {queries}: pass num_groups, the number of groups in the checkpoint"
        )
    if rows % groups or rows // groups < queries:
        raise CheckpointMismatch(
            f"{name} has {rows} rows in the checkpoint, which are not {groups} groups of at least {queries} queries, "
            f"as many as the model has per group"
        )
    if loaded.shape[1:] != current.shape[1:]:
        raise CheckpointMismatch(
            f"{name} has rows of shape {list(loaded.shape[1:])} in the checkpoint and "
            f"{list(current.shape[1:])} in the model"
        )
    grouped = loaded.unflatten(0, (groups, -1))[: model.config.num_groups, :queries]
    fresh = current.unflatten(0, (model.config.num_groups, queries))[len(grouped) :]
    return torch.cat((grouped.to(fresh), fresh)).flatten(0, 1), (groups, model.config.num_groups)
