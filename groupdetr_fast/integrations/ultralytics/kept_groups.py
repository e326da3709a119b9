"""The groups that Ultralytics' checkpoints leave out: a file beside last.pt, and to which checkpoint they belong."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ...tensor_files import read_tensors
from .groups import HEADS, OTHERS, heads_of_others

__all__ = ["KEPT", "Groups", "are_same", "heads_of", "of_model", "read", "write"]

KEPT = "groups_of_last.pt"  # Ultralytics takes every last*.pt for a checkpoint
_LARGEST = torch.finfo(torch.half).max  # what infinities become in Ultralytics' checkpoints, and NaN becomes 0


class Groups(TypedDict):
    """The groups of one checkpoint.

    Attributes:
        num_groups: K.
        epoch: from 0.
        checkpoint: of which group 0 it is, as a hash.
        heads: the state dict of the heads of all groups but the first.
    """

    num_groups: int
    epoch: int
    checkpoint: str
    heads: dict[str, Tensor]


def of_model(model: nn.Module, epoch: int) -> Groups:
    """A copy on the CPU of the groups of a model, without anything that is not finite."""
    others = heads_of_others(model)
    heads = {name: _finite(value.detach().cpu()) for name, value in others.state_dict().items()}
    return {"num_groups": len(others) + 1, "epoch": epoch, "checkpoint": _hash_of(model), "heads": heads}


def read(folder: Path) -> list[Groups]:
    """What the file of a folder has, the newest last; empty without such a file.

    Raises:
        ValueError: if the file cannot be read.
    """
    path = folder / KEPT
    try:
        return read_tensors(path) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path}, with the groups of the training to resume, cannot be read: {error}") from None


def write(folder: Path, groups: list[Groups]) -> None:
    """Exchange the file of a folder as a whole, and make the folder if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{KEPT}.part"
    torch.save(groups, unfinished)
    os.replace(unfinished, folder / KEPT)


def heads_of(path: Path, checkpoint: Mapping[str, Any], num_groups: int) -> dict[str, Tensor]:
    """The heads that a checkpoint leaves out, from the file beside it.

    Args:
        path: of the checkpoint.
        checkpoint: what Ultralytics loads from there, with its ``ema``.
        num_groups: K of the training that goes on.

    Returns:
        The state dict; empty for one group.

    Raises:
        ValueError: if the training was started with another number of groups, or its groups are not found.
    """
    kept = read(path.parent)
    epoch, belongs_to = checkpoint["epoch"], _hash_of(checkpoint["ema"])
    for groups in kept:
        if (groups["epoch"], groups["checkpoint"]) == (epoch, belongs_to):
            if groups["num_groups"] != num_groups:
                started = groups["num_groups"]
                raise ValueError(f"the training was started with {started} groups: pass group_trainer({started})")
            return groups["heads"]
    if num_groups == 1:
        return {}
    file = path.parent / KEPT
    if not kept:
        raise ValueError(f"{file}, with the groups that {path} leaves out, is missing")
    epochs = [groups["epoch"] + 1 for groups in kept]
    if epoch + 1 not in epochs:
        of = " and ".join(map(str, epochs))
        raise ValueError(f"{file} has the groups of epoch {of}, not of {epoch + 1}: resume from last.pt")
    raise ValueError(f"{file} has the groups of another checkpoint than {path}: both must be from the same training")


def are_same(groups: Groups, others: Groups) -> bool:
    """Whether they are those of one checkpoint, to the bit."""
    heads, other_heads = groups["heads"], others["heads"]
    return groups["checkpoint"] == others["checkpoint"] and all(torch.equal(heads[n], other_heads[n]) for n in heads)


def _hash_of(model: nn.Module) -> str:
    """Of the heads of group 0, as a checkpoint has them: in half precision, and finite."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        parts = set(name.split("."))
        if parts.intersection(HEADS) and OTHERS not in parts:
            digest.update(_finite(value.detach().cpu().half()).numpy().tobytes())
    return digest.hexdigest()


def _finite(value: Tensor) -> Tensor:
    return value.nan_to_num(posinf=_LARGEST, neginf=-_LARGEST)
