"""What a run keeps so that it can be repeated: its configuration, and the files of one's own that this names."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from ..data.own_transforms import OwnTransforms, split_name
from ..files import write_whole
from ..yaml_files import has_layout, read_yaml, yaml_text
from .class_weights import ClassWeights
from .config import BALANCED, ROOMS, CocoTrainingConfig
from .config_file import from_yaml

__all__ = [
    "CLASS_WEIGHTS_FILE",
    "CONFIG_FILE",
    "TRANSFORMS_FILE",
    "begun_with",
    "keep_files",
    "was_begun",
    "with_kept_files",
]

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
TRANSFORMS_FILE, CLASS_WEIGHTS_FILE = "transforms_used.py", "class_weights_used.yaml"


def begun_with(folder: Path) -> CocoTrainingConfig | None:
    """The configuration that the run in a folder was begun with, or resumed with last; None if it is not there.

    Raises:
        OSError: if it cannot be read.
        ValueError: for a value that is not accepted, which one of an older version may have; the message says to edit
            the file.
    """
    path = folder / CONFIG_FILE
    try:
        return from_yaml(CocoTrainingConfig, path) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{error}: edit this file, which the run was begun with, to go on with it") from None


def was_begun(folder: Path) -> bool:
    """Whether the folder has the configuration of a run, as :func:`keep_files` writes it."""
    return _written_by_a_run(folder / CONFIG_FILE)


def with_kept_files(config: CocoTrainingConfig) -> CocoTrainingConfig:
    """The run with the files that :func:`keep_files` writes in place of those that were given."""
    if config.augmentation.transforms is not None:
        _, function = split_name(config.augmentation.transforms)
        kept = f"{config.output / TRANSFORMS_FILE}:{function}"
        config = replace(config, augmentation=replace(config.augmentation, transforms=kept))
    if config.class_weights not in (None, BALANCED):
        config = replace(config, class_weights=str(config.output / CLASS_WEIGHTS_FILE))
    return config


def keep_files(config: CocoTrainingConfig, own: OwnTransforms | None, weights: ClassWeights | None) -> None:
    """Write the run's configuration, transforms and weights of classes into its folder.

    Warns where a resumed run had other transforms or weights. A configuration that somebody wrote by hand, with
    comments, a layout of its own or a few settings alone, is not replaced: it gets another name.
    """
    texts = {
        TRANSFORMS_FILE: None if own is None else own.source,
        CLASS_WEIGHTS_FILE: None if weights is None else yaml_text(dict(zip(*weights, strict=True))),
    }
    for name, text in texts.items():
        path = config.output / name
        if text is None:
            continue
        if config.resume and path.exists() and path.read_text() != text:
            logger.warning("resuming with another content of %s than the run began with", path)
        write_whole(path, text)
    _spare(config.output / CONFIG_FILE)
    write_whole(config.output / CONFIG_FILE, with_kept_files(config).as_yaml())


def _spare(path: Path) -> None:
    if not path.exists() or _written_by_a_run(path):
        return
    names = (path.with_name(f"{path.stem}_before{number}{path.suffix}") for number in ("", *range(2, 1000)))
    kept = next(name for name in names if not name.exists())
    os.replace(path, kept)
    logger.warning("%s was not written by a run: it is called %s from now on", path, kept)


def _written_by_a_run(path: Path) -> bool:
    """Whether a configuration has the settings that every run writes, laid out as runs do, with no comment to lose.

    Values are not compared: runs of older versions lack some, and 0 may have been given for 0.0.
    """
    try:
        content = read_yaml(path)
        return isinstance(content, dict) and content.keys() >= set(ROOMS) and has_layout(path.read_text())
    except (OSError, ValueError):
        return False
