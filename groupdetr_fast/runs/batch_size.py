"""``--batch-size auto``: the number of images per batch, found before a training begins."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from ..data import Batch, CocoDataset, collate
from ..data.largest import largest_training_size
from ..random_state import random_state_kept
from ..training.batch_size import TrialSteps, found_batch_size
from ..training.display import Display
from .class_weights import criterion_of
from .config import CocoTrainingConfig
from .kept_files import begun_with

__all__ = ["largest_batch", "with_batch_size"]


def with_batch_size(
    config: CocoTrainingConfig, accelerator: Accelerator, dataset: CocoDataset, resumed: Path | None = None
) -> CocoTrainingConfig:
    """The run with a number in place of ``batch_size`` "auto", and with ``accumulate`` to match.

    A run that is resumed keeps its numbers, if they still make steps of as many images. Every process must call this.
    The generators of random numbers stay as they were, and no memory of the device stays taken.

    Args:
        config: the run; with a number it is returned as it is.
        accelerator: of the training.
        dataset: what is trained on.
        resumed: a checkpoint of the run, see :meth:`ModelConfig.build_untrained`.

    Raises:
        TrainingError: if the memory is too small for one image.
    """
    if config.optimization.batch_size != "auto":
        return config
    numbers, how = _numbers_of_beginning(config, accelerator), "as the run began"
    if numbers is None:
        with random_state_kept():
            numbers, how = _find_numbers(config, accelerator, dataset, resumed), "the largest that fits"
        clear_device_cache(garbage_collection=True)  # what was tried may hold itself in cycles
    batch_size, accumulate = numbers
    Display(accelerator).print(
        f"batch_size auto: {batch_size} images, {how}; accumulate {accumulate} for steps of "
        f"{config.optimization.images_per_step} images over all processes"
    )
    return replace(config, optimization=replace(config.optimization, batch_size=batch_size, accumulate=accumulate))


def _numbers_of_beginning(config: CocoTrainingConfig, accelerator: Accelerator) -> tuple[int, int] | None:
    beginning = begun_with(config.output) if config.resume else None
    begun = beginning.optimization if beginning is not None else None
    if begun is None or begun.batch_size == "auto":
        return None
    images = begun.batch_size * begun.accumulate * accelerator.num_processes
    return (begun.batch_size, begun.accumulate) if images == config.optimization.images_per_step else None


def _find_numbers(
    config: CocoTrainingConfig, accelerator: Accelerator, dataset: CocoDataset, resumed: Path | None
) -> tuple[int, int]:
    model = config.model.build_untrained(dataset.num_classes, resumed=resumed)
    trial = TrialSteps(
        accelerator,
        model,
        criterion_of(config, model).to(accelerator.device),
        config.optimization,
        lambda size: largest_batch(config, dataset, size),
    )
    return found_batch_size(accelerator, config.optimization, trial)


def largest_batch(config: CocoTrainingConfig, dataset: CocoDataset, size: int) -> Batch:
    """A made-up batch of ``size`` images, as large as those of the training can be and as full as the fullest.

    Its objects have the classes 0, 1, ... in turn, and boxes and masks of half the image.
    """
    height, width = largest_training_size(config.augmentation, dataset.image_sizes)
    objects = dataset.most_objects() * (2 if config.augmentation.copy_paste else 1)
    target: dict[str, Any] = {
        "labels": torch.arange(objects) % dataset.num_classes,
        "boxes": torch.full((objects, 4), 0.5),
    }
    if config.model.predicts_masks:
        target["masks"] = torch.zeros(objects, height, width, dtype=torch.bool)
        target["masks"][:, : height // 2] = True
    target |= {"image_id": 0, "original_size": torch.tensor([height, width])}
    target["normalization"] = config.augmentation.normalization
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return collate([(image, target)] * size)
