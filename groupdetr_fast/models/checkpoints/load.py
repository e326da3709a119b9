"""Loading a checkpoint into a model with any number of groups."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..detector import QUERY_PARAMETERS, Detector
from .layouts import CheckpointMismatch, Converted, StateDict
from .read import CheckpointFile, read_checkpoint
from .recognize import recognize_detector, recognize_layout

__all__ = ["LoadReport", "load_checkpoint"]

logger = logging.getLogger(__name__)

# Starts of the names whose shapes follow the number of classes.
CLASS_PARAMETERS = ("class_embed.", "enc_out_class_embed.", "label_enc.")

SHOWN = 5  # names in a message


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        layout: the code base whose names the checkpoint has.
        matched: names, in the model, of the tensors that were loaded.
        missing: names in the model that were not loaded; they keep their values.
        dropped: keys of the checkpoint that were not loaded.
        repeated: keys of the checkpoint that hold a matched tensor once more, as the original repositories save heads
            that two modules share.
        groups: (in the checkpoint, in the model) numbers of groups; None if the checkpoint has no queries.
    """

    layout: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    groups: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"{len(self.matched)} tensors loaded from a checkpoint of {self.layout}"
        if self.groups is not None and self.groups[0] != self.groups[1]:
            text += f"; groups: {self.groups[0]} in the checkpoint, {self.groups[1]} in the model"
        if self.missing:
            text += f"; missing: {_shown(self.missing)}"
        if self.dropped:
            text += f"; dropped: {_shown(self.dropped)}"
        return text


def load_checkpoint(
    model: Detector,
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    num_groups: int | None = None,
    new_class_head: bool = False,
    partial: bool = False,
) -> LoadReport:
    """Load weights into a detector of this package.

    Recognised are this package's files, those of the detector's original repository, and transformers' (a directory, a
    file or a state dict; the names of transformers 4 and 5). What each group has of its own (learned queries, DINO's
    encoder heads) is regrouped: if the model has more groups than the checkpoint, the others keep their fresh
    initialisation (copies of group 0 would stay copies); if it has fewer, the first groups are taken; fewer queries per
    group are taken from each group.

    Args:
        model: the detector; changed only if everything fits.
        path_or_state_dict: a file, a folder or a state dict.
        num_groups: groups in the checkpoint, where it does not say and its queries are not those of one group.
        new_class_head: keep the model's fresh class heads and label embedding where the number of classes differs.
        partial: take what fits, as from another detector's checkpoint, and leave the rest.

    Returns:
        A report, which is also logged.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        CheckpointMismatch: if the layout is unknown; without ``partial``, also if a tensor is missing, has no place or
            does not fit. The message names it.
        ValueError: if the file cannot be read.
    """
    file, target = read_checkpoint(path_or_state_dict), model.state_dict()
    layout = recognize_layout(file.state)
    converted = layout.convert(file.state, model)
    missing = _without_counters(name for name in target if name not in converted.tensors)
    unused = _without_counters(converted.unused)
    if not converted.tensors or (not partial and (missing or unused)):
        raise CheckpointMismatch(_difference(model, file.state, converted, missing))

    report = LoadReport(layout.name, missing=missing, dropped=unused, repeated=converted.repeated)
    if (groups := _count_groups(converted.tensors, model, file, num_groups)) is not None:
        report.groups = (groups, model.config.num_groups)
    accepted: StateDict = {}
    for name, loaded in converted.tensors.items():
        if name in model.group_parameters:
            loaded = _regroup(name, loaded, target[name], groups or 1, model)
        if loaded.shape == target[name].shape:
            accepted[name] = loaded
        elif partial or (new_class_head and name.startswith(CLASS_PARAMETERS)):
            report.missing.append(name)
            report.dropped.append(converted.keys[name])
        else:
            raise _misfit(name, loaded, target[name])
    if not accepted:
        raise CheckpointMismatch(f"no tensor of the checkpoint has the shape that {type(model).__name__} needs")
    model.load_state_dict(accepted, strict=False)
    report.matched = list(accepted)
    logger.log(logging.WARNING if report.missing else logging.INFO, "%s", report)
    return report


def _misfit(name: str, loaded: Tensor, current: Tensor) -> CheckpointMismatch:
    of_classes = name.startswith(CLASS_PARAMETERS)
    hint = " (pass new_class_head=True to train a new one)" if of_classes else ""
    return CheckpointMismatch(
        f"{name} has shape {list(loaded.shape)} in the checkpoint and {list(current.shape)} in the model{hint}",
        (len(loaded), len(current)) if of_classes else None,
    )


def _without_counters(names: Iterable[str]) -> list[str]:
    """Without the counters of batch norms: they serve a way of averaging that no network here uses."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _difference(model: Detector, state: StateDict, converted: Converted, missing: Sequence[str]) -> str:
    text = f"the checkpoint does not fit {type(model).__name__}"
    detector = recognize_detector(state)
    if detector is not None:
        text += f" (it looks like one of {detector})"
    if not converted.tensors:
        return f"{text}: no tensor of it belongs to the model"
    if missing:
        text += f"; it lacks {_shown(missing)}"
    unused = _without_counters(converted.unused)
    if unused:
        text += f"; the model has no place for {_shown(unused)}"
    return f"{text}; pass partial=True to load what fits"


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _count_groups(tensors: StateDict, model: Detector, file: CheckpointFile, num_groups: int | None) -> int | None:
    """The number of groups in a checkpoint; None if it has no queries of the model's kind."""
    names = [name for name in model.group_parameters if name.startswith(QUERY_PARAMETERS) and name in tensors]
    if not names:
        return None
    name = names[0]
    rows, queries = len(tensors[name]), model.config.num_queries
    if num_groups or file.num_groups:
        return num_groups or file.num_groups
    if file.num_queries and rows % file.num_queries == 0:
        return rows // file.num_queries
    if rows in (queries, queries * model.config.num_groups):
        return rows // queries
    raise CheckpointMismatch(
        f"{name} has {rows} rows in the checkpoint, neither one group of {queries} queries nor the model's "
        f"{model.config.num_groups} * {queries}: pass num_groups, the number of groups in the checkpoint"
    )


def _regroup(name: str, loaded: Tensor, current: Tensor, groups: int, model: Detector) -> Tensor:
    """Fit group-major rows of a checkpoint with ``groups`` groups to those of the model.

    Rows that are no queries, and do not fit, come back as they are.
    """
    rows, own_groups = len(loaded), model.config.num_groups
    wanted = len(current) // own_groups
    if loaded.shape[1:] != current.shape[1:]:
        return loaded
    if name.startswith(QUERY_PARAMETERS):
        if rows % groups or rows // groups < wanted:
            raise CheckpointMismatch(
                f"{name} has {rows} rows in the checkpoint, which are not {groups} groups of at least {wanted} "
                f"queries, as many as the model has per group"
            )
    elif rows != groups * wanted:
        return loaded
    grouped = loaded.unflatten(0, (groups, -1))[:own_groups, :wanted]
    fresh = current.unflatten(0, (own_groups, wanted))[len(grouped) :]
    return torch.cat((grouped.to(fresh), fresh)).flatten(0, 1)
