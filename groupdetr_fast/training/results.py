"""What a training says of itself in ``results.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .config import OptimizationConfig
from .processes import mean_losses
from .progress import peak_memory_mib
from .selection import best_epoch
from .state import TrainingState

__all__ = ["RESULTS", "results_of", "row_of_epoch"]

RESULTS = "results.json"  # in the folder of a run


def row_of_epoch(state: TrainingState, *, graphs: bool) -> dict[str, Any]:
    """What the history says of the current epoch; every process must call this.

    Args:
        state: of the training, all of whose steps are counted.
        graphs: whether steps are CUDA graphs.
    """
    current = state.current
    return {
        "epoch": state.epoch + 1,
        "seconds": round(current.seconds, 2),
        "peak_memory_mib": peak_memory_mib(),
        "skipped_steps": current.skipped,
        **({} if state.accelerator.scaler is None else {"overflowed_steps": current.overflowed}),
        **({"steps_without_graph": current.without_graph} if graphs else {}),
        "unreadable_images": len(state.unreadable()),
        "gradient_norm": current.norms / current.steps if current.steps else None,
        "clipped_steps": current.clipped,
        "train": {name: (total / current.steps).item() for name, total in mean_losses(current.sums).items()},
    }


def results_of(
    history: Sequence[dict[str, Any]], config: OptimizationConfig, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        history: a row for each epoch that has ended.
        config: how it trains.
        metadata: what is needed to rebuild the model.
    """
    best = best_epoch(history)
    return {
        **metadata,
        "optimization": asdict(config),
        "torch": torch.__version__,
        "peak_memory_mib": max((row["peak_memory_mib"] for row in history), default=None),
        "best_epoch": best and best["epoch"],
        "epochs": history,
    }
