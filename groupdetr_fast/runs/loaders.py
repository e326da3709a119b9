"""The data sets of a run, and batches of them."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import CocoDataset, DataError, EpochSampler, SkipUnreadable, collate, eval_transforms, train_transforms
from ..data.copy_paste import CopyPaste
from ..data.device_images import CacheRefused, DeviceImages, as_it_is
from ..data.own_transforms import OwnTransforms, try_on_samples
from ..training.faults import obey_parent_alone
from .config import CocoTrainingConfig

__all__ = [
    "evaluation_batch_size",
    "evaluation_loader",
    "evaluation_samples",
    "evaluation_set",
    "training_loader",
    "training_samples",
    "training_set",
]

logger = logging.getLogger(__name__)

Images = CocoDataset | SkipUnreadable | DeviceImages


def training_set(config: CocoTrainingConfig, own: OwnTransforms | None = None) -> CocoDataset:
    """The images to train on, augmented.

    Args:
        config: the run.
        own: the transform that the configuration names, where it is loaded already.

    Raises:
        DataError: for a fault in the data, or if the configuration does not say where they are.
        TransformError: for a fault of the transform that the configuration names, which is tried on a few images.
    """
    augmentation = config.augmentation
    if augmentation.transforms is not None and own is None:
        own = OwnTransforms(augmentation.transforms)
    paste = None
    if augmentation.copy_paste:
        paste = CopyPaste(augmentation.copy_paste, augmentation.copy_paste_prefer_small)
    transforms = train_transforms(augmentation, own)
    seed = config.optimization.seed
    dataset = _dataset(config, *config.data.train_paths(), transforms, seed=seed, copy_paste=paste)
    if own is not None:
        try_on_samples(own, dataset)
    return dataset


def evaluation_set(config: CocoTrainingConfig) -> CocoDataset:
    """The images to evaluate on; raises as :func:`training_set`."""
    return _dataset(config, *config.data.val_paths(), eval_transforms(config.augmentation))


def training_samples(
    dataset: CocoDataset, config: CocoTrainingConfig, device: torch.device
) -> SkipUnreadable | DeviceImages:
    """What :func:`training_loader` loads of :func:`training_set`: from the device, if images are to be kept there.

    Raises:
        CacheRefused: if they cannot be kept there, and not on the host instead.
        DataError: if images are to be kept in memory and one cannot be read. If they are not, as many are left out as
            the configuration allows.
    """
    found = _where_kept(dataset, config, device, training=True)
    if isinstance(found, DeviceImages):
        return found
    return SkipUnreadable(dataset, 0 if config.strict else config.data.max_unreadable_images)


def evaluation_samples(
    dataset: CocoDataset, config: CocoTrainingConfig, device: torch.device
) -> CocoDataset | DeviceImages:
    """What :func:`evaluation_loader` loads of :func:`evaluation_set`; see :func:`training_samples`."""
    return _where_kept(dataset, config, device, training=False)


def _where_kept(
    dataset: CocoDataset, config: CocoTrainingConfig, device: torch.device, *, training: bool
) -> CocoDataset | DeviceImages:
    """The data set with its images where the configuration wants them."""
    if config.data.cache_on == "host":  # where the data set has them already, if they are to be kept at all
        return dataset
    try:
        return DeviceImages(dataset, config.augmentation, device, training=training)
    except CacheRefused as refused:
        if config.data.cache_on == "device":
            raise
        logger.info("images of %s are kept on the host: %s", dataset.image_folder, refused)
    dataset.cache_images()
    return dataset


def _order_of_training(dataset: CocoDataset, config: CocoTrainingConfig) -> tuple[list[int] | None, Tensor | None]:
    """Which samples are taken, None for all, and how often each comes in an epoch; see :class:`EpochSampler`."""
    indices = dataset.indices_with_objects() if config.data.filter_empty else None
    repeats = None
    if config.data.repeat_factor_threshold:
        repeats = dataset.repeat_factors(config.data.repeat_factor_threshold)
        repeats = repeats if indices is None else repeats[indices]
    return indices, repeats


def training_loader(dataset: Images, config: CocoTrainingConfig) -> DataLoader[Any]:
    """Shuffled batches of :func:`training_set`, or of what :func:`training_samples` makes of it."""
    bare: Any = getattr(dataset, "dataset", dataset)
    indices, repeats = _order_of_training(bare, config)
    sampler = EpochSampler(dataset, seed=config.optimization.seed, indices=indices, repeats=repeats)
    min_size = config.augmentation.jitter_size or 0
    return _loader(dataset, config, sampler, config.optimization.images_per_batch, min_size)


def evaluation_loader(dataset: Images, config: CocoTrainingConfig, images: int | None = None) -> DataLoader[Any]:
    """Batches of :func:`evaluation_set`, in its order; of the first ``images`` only, if that is given."""
    sampler = EpochSampler(dataset, shuffle=False, indices=range(len(dataset))[:images])
    return _loader(dataset, config, sampler, evaluation_batch_size(config))


def evaluation_batch_size(config: CocoTrainingConfig) -> int:
    """Images per process that are evaluated at a time."""
    return config.optimization.images_per_batch if config.eval_batch_size is None else config.eval_batch_size


def _dataset(
    config: CocoTrainingConfig, images: Path, annotations: Path, transforms: Callable[..., Any], **settings: Any
) -> CocoDataset:
    dataset = CocoDataset(
        images,
        annotations,
        transforms,
        labels=config.data.labels,
        masks=config.model.predicts_masks,
        cache_images=config.data.cache_images and config.data.cache_on == "host",
        **settings,
    )
    if dataset.num_objects == 0:
        raise DataError(f"annotation file {annotations} has no object that can be used; groupdetr check says why")
    return dataset


def _loader(
    dataset: Images, config: CocoTrainingConfig, sampler: EpochSampler, batch_size: int, min_size: int = 0
) -> DataLoader[Any]:
    if isinstance(dataset, DeviceImages):
        return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=as_it_is)
    workers = config.data.resolved_workers()
    # A step takes all its batches at once, as their objects are what its losses are divided by: so while one step is
    # computed, the batches of the next are loaded, and one more of each process.
    ahead = config.data.prefetch_factor or -(-config.optimization.accumulate // max(workers, 1)) + 1
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        collate_fn=partial(collate, min_size=min_size),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=obey_parent_alone,
    )
