"""What a run that is resumed must have in common with its beginning."""

import logging
from pathlib import Path
from typing import Any

from ..data import CocoDataset
from ..data.categories import difference_in_words
from ..files import read_json
from ..models.checkpoints import read_header
from ..training.checkpoint import WEIGHTS, resumable_checkpoints
from ..training.results import RESULTS
from ..training.selection import has_ended
from .config import CocoTrainingConfig
from .folder import PAGE
from .kept_files import CONFIG_FILE, begun_with, was_begun, with_kept_files

__all__ = ["described_checkpoint", "require_data", "require_same_run", "seems_ended", "warn_of_changes"]

logger = logging.getLogger(__name__)

# The settings that resuming cannot change, besides those of the detector; and those of the detector that it can.
FIXED = {"data.labels"} | {
    f"optimization.{name}" for name in ("backbone_layer_decay", "decay_norms", "freeze", "query_lr", "seed")
}
FREE = {
    f"model.{name}" for name in ("dropout", "class_loss", "l1_loss", "giou_loss", "loss_points", "accelerate_kernels")
}


def described_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed and has a header that says what its detector is.

    None if there is none. Resuming goes back to the one before where weights are damaged or missing, and so does this.
    """
    for folder in resumable_checkpoints(run):
        try:
            # Without weights the header would be what config.json of a model of transformers says, or empty.
            if (folder / WEIGHTS).is_file() and read_header(folder).model is not None:
                return folder
        except ValueError:
            continue
    return None


def seems_ended(config: CocoTrainingConfig) -> bool:
    """Whether the folder has the results of all epochs of the run, and the page about them if there is to be one.

    Its checkpoints may be damaged all the same, so that the run has to go back to an earlier one.
    """
    epochs, results = config.optimization.resolved().epochs, read_json(config.output / RESULTS)
    history = [] if results is None else results["epochs"]
    ended = has_ended(history, epochs, config.early_stopping, config.early_stopping_delta)
    return ended and (not config.report or (config.output / PAGE).exists())


def require_data(config: CocoTrainingConfig) -> None:
    """Refuse to resume a run that has a configuration, without data, as if the folder alone were enough.

    Raises:
        ValueError: the message says how to resume it.
    """
    if config.resume and not config.data.given and was_begun(config.output):
        raise ValueError(
            f"to go on with the run in {config.output}, name its data and settings, or the file that has them: "
            f"--config {config.output / CONFIG_FILE} --resume"
        )


def require_same_run(config: CocoTrainingConfig, val_set: CocoDataset, newest: Path | None) -> None:
    """Refuse to resume a run as another one.

    Args:
        config: the run as it is resumed.
        val_set: what it is evaluated on.
        newest: its :func:`described_checkpoint`; without one, its classes are not compared.

    Raises:
        ValueError: for a setting that cannot change within a run, and for data of other classes.
    """
    for name, begun, now in _changes(config):
        if name in FIXED or (name.startswith("model.") and name not in FREE):
            raise ValueError(
                f"{config.output} was begun with {name} = {begun}, which cannot become {now} on resuming: "
                "leave it as it was, or begin another run with another output"
            )
    _compare_categories(config, val_set, newest)


def warn_of_changes(config: CocoTrainingConfig) -> None:
    """Say which settings of a run that is resumed are not those of its beginning."""
    for name, begun, now in _changes(config):
        logger.warning("resuming with %s = %s, which was %s", name, now, begun)


def _changes(config: CocoTrainingConfig) -> list[tuple[str, Any, Any]]:
    """Name, value at the beginning and value now of the settings that differ."""
    beginning = begun_with(config.output)
    if beginning is None:  # runs of older versions have none
        return []
    begun, now = beginning.by_name(), with_kept_files(config).by_name()
    return [(name, begun[name], now[name]) for name in now if now[name] != begun[name]]


def _compare_categories(config: CocoTrainingConfig, val_set: CocoDataset, newest: Path | None) -> None:
    """Refuse other classes even where there are as many."""
    begun = [] if newest is None else read_header(newest).categories
    difference = difference_in_words(begun, val_set.categories, ("the run", "the data"))
    if begun and difference:
        raise ValueError(
            f"{config.output} was begun with other categories than those of {val_set.annotation_file} "
            f"({difference}): resume with the data of its beginning, or begin another run with another output, and "
            "load to start from these weights"
        )
