"""What a run that is resumed must have in common with its beginning."""

import logging
from pathlib import Path

from ..data import CocoDataset
from ..data.categories import difference_in_words
from ..models.checkpoints import read_header
from ..training.checkpoint import resumable_checkpoints
from .config import CocoTrainingConfig
from .kept_files import begun_with, with_kept_files

__all__ = ["described_checkpoint", "require_same_run"]

logger = logging.getLogger(__name__)

# What resuming cannot change, besides the detector; and what it can change of that.
FIXED = {"data.labels"} | {
    f"optimization.{name}" for name in ("backbone_layer_decay", "decay_norms", "freeze", "query_lr", "seed")
}
FREE = {
    f"model.{name}" for name in ("dropout", "class_loss", "l1_loss", "giou_loss", "loss_points", "accelerate_kernels")
}


def described_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that can be resumed and is not damaged where it says what its detector is."""
    for folder in resumable_checkpoints(run):
        try:
            read_header(folder)
        except ValueError:  # resuming says so, and goes back to the one before it
            continue
        return folder
    return None


def require_same_run(config: CocoTrainingConfig, val_set: CocoDataset, *, loud: bool) -> None:
    """Refuse to resume a run as another one, and say which settings have changed that may.

    Args:
        config: the run as it is resumed.
        val_set: what it is evaluated on.
        loud: whether to say anything of settings that may change.

    Raises:
        ValueError: for a setting that cannot change within a run, and for data of other classes.
    """
    beginning = begun_with(config.output)
    if beginning is not None:  # runs of older versions have none
        _compare_settings(config, beginning, loud=loud)
    _compare_categories(config, val_set)


def _compare_settings(config: CocoTrainingConfig, beginning: CocoTrainingConfig, *, loud: bool) -> None:
    begun, now = beginning.by_name(), with_kept_files(config).by_name()
    for name in now:
        if now[name] == begun[name]:
            continue
        if name in FIXED or (name.startswith("model.") and name not in FREE):
            raise ValueError(
                f"{config.output} was begun with {name} = {begun[name]}, which cannot become {now[name]} on resuming: "
                "leave it as it was, or begin another run with another output"
            )
        if loud:
            logger.warning("resuming with %s = %s, which was %s", name, now[name], begun[name])


def _compare_categories(config: CocoTrainingConfig, val_set: CocoDataset) -> None:
    """Refuse other classes even where there are as many."""
    newest = described_checkpoint(config.output)
    begun = [] if newest is None else read_header(newest).categories
    difference = difference_in_words(begun, val_set.categories, ("the run", "the data"))
    if begun and difference:
        raise ValueError(
            f"{config.output} was begun with other categories than those of {val_set.annotation_file} "
            f"({difference}): resume with the data of its beginning, or begin another run with another output, and "
            "load to start from these weights"
        )
