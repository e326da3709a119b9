"""Checkpoints of a training run: weights as safetensors, and the state that resuming needs.

A run's folder holds ``checkpoints/epoch_0001/model.safetensors`` and so on, one per epoch, and ``state.pt`` beside the
newest. A checkpoint is written under another name and renamed when it is complete, so a folder that exists is whole.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["CheckpointError", "latest_checkpoint", "load_training_state", "save_checkpoint"]

WEIGHTS, STATE = "model.safetensors", "state.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why."""


def save_checkpoint(
    run: Path, epoch: int, model: nn.Module, optimizer: Any, scheduler: Any, metadata: dict[str, Any]
) -> Path:
    """Write the checkpoint of a finished epoch (counted from 1) and drop the older epochs' resume state.

    Args:
        run: folder of the run.
        epoch: the epoch that has just ended.
        model: the bare model.
        optimizer, scheduler: as built by ``training.optimization``.
        metadata: what is needed to rebuild the model; kept as json in the header of the weights file.

    Returns:
        The checkpoint's folder.
    """
    folder = run / "checkpoints" / f"epoch_{epoch:04d}"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt", "groupdetr_fast": json.dumps(metadata)})
    state = {
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": _random_state(),
    }
    torch.save(state, unfinished / STATE)
    for file in unfinished.iterdir():
        _sync(file)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(unfinished, folder)
    _sync(folder.parent)
    for other in folder.parent.glob(f"epoch_*/{STATE}"):
        if other.parent != folder:
            other.unlink()
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed, or None."""
    candidates = sorted(path.parent for path in (run / "checkpoints").glob(f"epoch_*/{STATE}"))
    return candidates[-1] if candidates else None


def load_training_state(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Restore everything that :func:`save_checkpoint` wrote; returns the epoch that had ended.

    Raises:
        CheckpointError: if a file is missing, damaged, or belongs to another model.
    """
    try:
        weights = load_file(folder / WEIGHTS)
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from None
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        _restore_random_state(state["rng"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} does not belong to this model and optimiser: {error}") from None
    return state["epoch"]


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
