"""What a run keeps of files of one's own, so that it can be repeated when these have changed."""

import logging
from dataclasses import replace

from ..data.own_transforms import OwnTransforms, split_name
from ..files import write_whole
from .config import CocoTrainingConfig

__all__ = ["TRANSFORMS_FILE", "keep_transforms", "with_kept_transforms"]

logger = logging.getLogger(__name__)

TRANSFORMS_FILE = "transforms_used.py"


def with_kept_transforms(config: CocoTrainingConfig) -> CocoTrainingConfig:
    """The run with the transforms of the file that :func:`keep_transforms` writes, for ``config.yaml``."""
    if config.augmentation.transforms is None:
        return config
    _, function = split_name(config.augmentation.transforms)
    kept = f"{config.output / TRANSFORMS_FILE}:{function}"
    return replace(config, augmentation=replace(config.augmentation, transforms=kept))


def keep_transforms(config: CocoTrainingConfig, own: OwnTransforms | None) -> None:
    """Write the file of the run's transforms into its folder; warn where a resumed run had another text."""
    if own is None:
        return
    path = config.output / TRANSFORMS_FILE
    if config.resume and path.exists() and path.read_text(encoding="utf-8") != own.source:
        logger.warning("resuming with another text of %s than the run began with", own.name)
    write_whole(path, own.source)
