"""The best epoch of a run, when to stop waiting for a better one, and whether the run has ended.

All follow from the run's history alone, so that a run that was resumed chooses as one that was not interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["best_epoch", "epochs_without_gain", "has_ended"]


def best_epoch(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of the epoch with the highest AP, the first of several; None if no epoch has one.

    Args:
        history: an entry for each finished epoch, with ``"epoch"`` and, where it was evaluated, ``"metrics"``.
    """
    evaluated = [row for row in history if "AP" in row.get("metrics", {})]
    return max(evaluated, key=lambda row: row["metrics"]["AP"], default=None)


def epochs_without_gain(history: Sequence[Mapping[str, Any]], delta: float) -> int:
    """Epochs since AP rose for the last time, as far as it was evaluated.

    Args:
        history: see :func:`best_epoch`.
        delta: AP has risen where it exceeds the AP of the last rise by more than this.
    """
    reference, since, last = float("-inf"), 0, 0
    for row in history:
        if "AP" in row.get("metrics", {}):
            last = row["epoch"]
            if row["metrics"]["AP"] > reference + delta:
                reference, since = row["metrics"]["AP"], last
    return last - since


def has_ended(history: Sequence[Mapping[str, Any]], epochs: int, patience: int, delta: float) -> bool:
    """Whether nothing is left to train or to evaluate.

    Args:
        history: see :func:`best_epoch`.
        epochs: of the whole run.
        patience: epochs without a better AP after which it ends; 0 to train all.
        delta: see :func:`epochs_without_gain`.
    """
    if not history or "metrics" not in history[-1]:
        return False
    return len(history) >= epochs or (patience > 0 and epochs_without_gain(history, delta) >= patience)
