"""Checkpoints of a training run: weights as safetensors, and the state that resuming needs.

A run's folder holds ``checkpoints/epoch_0001/model.safetensors`` and so on, one per finished epoch. A checkpoint within
an epoch is called ``epoch_0001_batch_000040``: one epoch has ended, and 40 batches of the next. The two newest
checkpoints also have ``state.pt`` and can be resumed; older ones within an epoch are removed, and those of epochs too
if only some are to be kept. ``checkpoints/best`` has the weights of the best epoch.

A checkpoint is written under another name, forced to disk and renamed when it is complete, so that a folder that
exists is whole whenever the process or the machine stops.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..files import force_to_disk
from ..tensor_files import read_tensors

__all__ = [
    "CheckpointError",
    "amend_checkpoint",
    "latest_checkpoint",
    "mark_best",
    "read_checkpoint",
    "resumable_checkpoints",
    "save_checkpoint",
    "write_weights",
]

WEIGHTS, STATE = "model.safetensors", "state.pt"
CHECKPOINTS, BEST = "checkpoints", "best"  # folders: in that of a run, and in the first


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message says which and why."""


def save_checkpoint(
    run: Path,
    epoch: int,
    batches: int,
    weights: Mapping[str, Tensor],
    state: dict[str, Any],
    metadata: dict[str, Any],
    keep: int = 0,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint, and then remove what resuming no longer needs.

    Args:
        run: folder of the run.
        epoch: number of epochs that have ended.
        batches: number of batches of the next epoch that have ended; 0 between two epochs.
        weights: of the bare model.
        state: what else resuming needs, in types that ``torch.load(weights_only=True)`` reads.
        metadata: what is needed to rebuild the model; kept as json in the header of the weights file.
        keep: epochs whose weights stay, the newest ones; 0 for all. What can be resumed and the best stay in any case.
        files: texts to write beside the weights, by the name of the file, for those who read the weights otherwise.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk. Older checkpoints are then as they were.
    """
    name = f"epoch_{epoch:04d}" + (f"_batch_{batches:06d}" if batches else "")
    folder = run / CHECKPOINTS / name
    unfinished = folder.with_name(f".{name}.unfinished")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        for leftover in folder.parent.glob(".*.unfinished"):  # of a process that was killed
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        write_weights(unfinished / WEIGHTS, weights, metadata)
        torch.save(state, unfinished / STATE)
        for file_name, text in (files or {}).items():
            (unfinished / file_name).write_text(text)
        for path in (*unfinished.iterdir(), unfinished):
            force_to_disk(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(unfinished, folder)
        force_to_disk(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch wrap the system's errors
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"checkpoint {folder} cannot be written: {error}; {_whats_left(run)}") from None
    _remove_superseded(run, folder, keep)
    return folder


def amend_checkpoint(folder: Path, metadata: dict[str, Any], **changes: Any) -> None:
    """Change what a checkpoint says beside its weights, such as metrics that came later; it is whole at any moment.

    Args:
        folder: of the checkpoint.
        metadata: see :func:`save_checkpoint`; instead of what it had.
        changes: entries of its state.

    Raises:
        CheckpointError: if it cannot be read or written. It is then as it was.
    """
    weights, state = read_checkpoint(folder)
    writers: dict[str, Callable[[Path], None]] = {
        WEIGHTS: lambda path: write_weights(path, weights, metadata),
        STATE: lambda path: torch.save({**state, **changes}, path),
    }
    try:
        for name, write in writers.items():
            unfinished = folder / f".{name}.unfinished"
            write(unfinished)
            force_to_disk(unfinished)
            os.replace(unfinished, folder / name)  # the tensors are the same: old and new files go together
        force_to_disk(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        for name in (WEIGHTS, STATE):
            (folder / f".{name}.unfinished").unlink(missing_ok=True)
        raise CheckpointError(f"checkpoint {folder} cannot be written: {error}; it can be resumed as it was") from None


def resumable_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that can be resumed, newest first."""
    return sorted((path.parent for path in (run / CHECKPOINTS).glob(f"epoch_*/{STATE}")), reverse=True)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed, or None."""
    return next(iter(resumable_checkpoints(run)), None)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state that :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: if a file is missing, damaged, or not what this package writes.
    """
    try:
        weights, state = (read_tensors(folder / name) for name in (WEIGHTS, STATE))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {folder} cannot be read: {STATE} holds no state of a training")
    return weights, state


def mark_best(run: Path, epoch: int) -> None:
    """Let ``checkpoints/best`` have the weights of a finished epoch, and the texts beside them.

    The files are other names of the same ones, and copies only where the file system has no hard links. They are whole
    at any moment.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk.
    """
    source = run / CHECKPOINTS / f"epoch_{epoch:04d}" / WEIGHTS
    target = run / CHECKPOINTS / BEST / WEIGHTS
    # Someone may have removed the weights of old epochs; those that are marked are then the best still.
    if not source.exists() or (target.exists() and target.samefile(source)):
        return
    try:
        target.parent.mkdir(exist_ok=True)
        beside = [path for path in source.parent.iterdir() if path.name not in (WEIGHTS, STATE)]
        for path in (*beside, source):  # the weights last: before them, these files are of no use
            _link(path, target.with_name(path.name))
        force_to_disk(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}; {_whats_left(run)}") from None


def _link(source: Path, target: Path) -> None:
    """Let ``target`` be another name of a file, or a copy of it; it is whole at any moment."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # of a process that was killed
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
        force_to_disk(unfinished)
    os.replace(unfinished, target)


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a file of weights, with what is needed to rebuild the model in its header."""
    save_file(dict(weights), path, metadata={"format": "pt", "groupdetr_fast": json.dumps(metadata)})
    # safetensors lets nobody else read its files; the folder is as the umask says
    path.chmod(path.parent.stat().st_mode & 0o666)


def _remove_superseded(run: Path, newest: Path, keep: int) -> None:
    """Keep ``newest`` and the one before it resumable; those after it are damaged, or the run has gone back."""
    before = [folder for folder in resumable_checkpoints(run) if folder.name < newest.name]
    kept = {newest, *before[:1]}
    for folder in (run / CHECKPOINTS).glob("epoch_*"):
        if folder in kept:
            continue
        (folder / STATE).unlink(missing_ok=True)
        if "_batch_" in folder.name:
            shutil.rmtree(folder)
    if keep:
        epochs = sorted(path for path in (run / CHECKPOINTS).glob("epoch_*") if "_batch_" not in path.name)
        for folder in epochs[:-keep]:
            if folder not in kept:
                shutil.rmtree(folder)


def _whats_left(run: Path) -> str:
    latest = latest_checkpoint(run)
    return "there is no earlier one" if latest is None else f"{latest} is intact and can be resumed"
