"""A small data set in the memory of a device: as detectors take it, but for the normalisation.

What is done to an image in every epoch anew is done here once, as far as it has few outcomes: the image as it is and
mirrored, each resized by the very transforms that would do it again and again. A step then chooses among them on the
device, for all images of a batch at once, and the host neither decodes nor resizes, nor does it copy pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..targets import PackedTargets, tensor_on
from .batch import Batch, common_normalization
from .coco import CocoDataset, Transforms
from .sampling import generator_of, seeded
from .transforms import AugmentationConfig, eval_transforms, train_transforms

__all__ = ["CacheRefused", "DeviceImages", "as_it_is"]

SHARE_OF_FREE_MEMORY = 0.5  # that the images of a data set may take
_GIB = 2**30


class CacheRefused(ValueError):
    """A data set that cannot lie on a device; the message says why and what to do."""


class DeviceImages(Dataset[Batch]):
    """The samples of a data set on a device, from which batches are made there.

    ``__getitems__([(epoch, index), ...])``, which a DataLoader calls, is the batch that ``collate`` makes of these
    samples of the :class:`CocoDataset`: the same pixels, objects and random draws. Its images are bytes on the device;
    :meth:`Batch.to` normalises them there. The DataLoader has :func:`as_it_is` for ``collate_fn``, and no workers.

    Args:
        dataset: the images; its own transforms do not matter.
        augmentation: sizes, and the probability of a flip.
        device: where the images are to lie.
        training: whether samples are those of training, or those of evaluation.

    Attributes:
        dataset: as given.
        nbytes: of the images on the device.

    Raises:
        CacheRefused: for an augmentation with more outcomes than a flip, for masks of objects, and for images that take
            more than half of the memory that is free on the device. Of lack of memory the message says "out of memory",
            by which a sweep knows that the run is to be made again when there is more.
        DataError: for an image that cannot be read.
    """

    def __init__(self, dataset: CocoDataset, augmentation: AugmentationConfig, device: torch.device, *, training: bool):
        reason = _unbounded(augmentation) if training else None
        if dataset.masks:
            reason = "is for detectors of boxes, and this one predicts masks"
        if reason is not None:
            raise CacheRefused(f"cache_on device {reason}; or leave cache_on at host")
        self.dataset = dataset
        self.device = device
        self.seed = dataset.seed
        self.flip = augmentation.flip if training else 0.0
        # Rows 0 to N - 1 are the images as they are, and after them come the mirrored ones.
        transforms = _outcomes(augmentation, training)
        sizes = _sizes_after(transforms[0], dataset.image_sizes) * len(transforms)
        self.nbytes = sum(3 * height * width for height, width in sizes)
        _check_room(self.nbytes, len(sizes), device)
        try:
            self._pixels, self._targets = _load(dataset, transforms, sizes, device)
        except torch.OutOfMemoryError:  # another program was faster
            raise CacheRefused(
                f"cache_on device: {device} is out of memory for {len(sizes)} images of {self.nbytes / _GIB:.2f} GiB: "
                "leave cache_on at host"
            ) from None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """The batch of one sample."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these samples, ``(epoch, index)`` each, in this order."""
        rows = [self._row(epoch, index) for epoch, index in keys]
        at = tensor_on(rows, self.device)
        images, masks = self._pixels.batch(rows, at)
        targets, sizes, normalization = self._targets.batch(rows, at)
        ids = [self.dataset.image_ids[index] for _, index in keys]
        return Batch(images, masks, targets, ids, sizes, normalization)

    def _row(self, epoch: int, index: int) -> int:
        """Where a sample lies."""
        if self.flip == 0:
            return index
        # the first number that the transforms draw
        mirrored = bool(torch.rand(1, generator=generator_of(self.seed, epoch, index)) < self.flip)
        return index + mirrored * len(self.dataset)


def as_it_is(batch: Any) -> Any:
    """What :class:`DeviceImages` gives is a batch already; the ``collate_fn`` of its DataLoader."""
    return batch


def _unbounded(augmentation: AugmentationConfig) -> str | None:
    """What of an augmentation has too many outcomes; the sentence continues after the name of the setting."""
    settings: dict[str, tuple[Any, str]] = {
        "transforms": (augmentation.transforms is not None, "leave transforms out"),
        "copy_paste": (augmentation.copy_paste > 0, "set copy_paste to 0"),
        "jitter_size": (augmentation.jitter_size is not None, "leave jitter_size out"),
        "crop": (augmentation.jitter_size is None and augmentation.crop > 0, "set crop to 0"),
        "short_sides": (len(set(augmentation.short_sides)) > 1, "give short_sides one size"),
    }
    for name, (set_, then) in settings.items():
        if set_:
            value = getattr(augmentation, name)
            return f"holds each image as it is and mirrored, and {name}={value} makes another one each time: {then}"
    return None


def _outcomes(augmentation: AugmentationConfig, training: bool) -> list[Transforms]:
    """Transforms without chance, one for each outcome."""
    if not training:
        return [eval_transforms(augmentation)]
    flips = [0.0, 1.0] if augmentation.flip > 0 else [0.0]
    return [train_transforms(replace(augmentation, flip=flip)) for flip in flips]


def _sizes_after(transforms: Transforms, sizes: Tensor) -> list[tuple[int, int]]:
    """(height, width) of images of ``sizes [N, 2]`` after transforms, which are asked for each size once."""
    before = [(height, width) for height, width in sizes.tolist()]
    after = {}
    with seeded(0, 0, 0):  # they draw, though it makes no difference
        for size in set(before):
            boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
            _, objects = transforms(None, {"boxes": boxes})
            after[size] = objects["boxes"].canvas_size
    return [after[size] for size in before]


def _free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device; of the host for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _check_room(nbytes: int, number: int, device: torch.device) -> None:
    room = _free_memory(device) * SHARE_OF_FREE_MEMORY
    if nbytes > room:
        raise CacheRefused(
            f"cache_on device: {number} images take {nbytes / _GIB:.2f} GiB, which is more than the half of the memory "
            f"that is free on {device} ({room / _GIB:.2f} GiB), and steps could run out of memory: leave cache_on at "
            "host"
        )


@dataclass(frozen=True)
class _Pixels:
    """Images ``[H, W, 3]`` uint8 in one block, colours innermost as decoders write them.

    Attributes:
        block: all of them, one after the other.
        images: views of it.
        sizes: (height, width) of each, on the host.
        sizes_on_device: the same, ``[R, 2]``.
        stacked: the block as ``[R, H, W, 3]`` where all images have one size, else None.
    """

    block: Tensor
    images: list[Tensor]
    sizes: list[tuple[int, int]]
    sizes_on_device: Tensor
    stacked: Tensor | None

    @classmethod
    def of(cls, sizes: list[tuple[int, int]], device: torch.device) -> "_Pixels":
        """Room for images of these sizes."""
        lengths = [3 * height * width for height, width in sizes]
        block = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        images = [part.view(*size, 3) for part, size in zip(block.split(lengths), sizes, strict=True)]
        stacked = block.view(-1, *sizes[0], 3) if len(set(sizes)) == 1 else None
        return cls(block, images, sizes, torch.tensor(sizes, device=device), stacked)

    def batch(self, rows: Sequence[int], at: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` and masks of padding ``[B, H, W]`` of these rows, which ``at`` has on the device."""
        if self.stacked is not None:
            images = self.stacked.index_select(0, at)
            return images.permute(0, 3, 1, 2), torch.zeros(images.shape[:3], dtype=torch.bool, device=images.device)
        height, width = (max(self.sizes[row][side] for row in rows) for side in (0, 1))
        images = self.block.new_zeros(len(rows), height, width, 3)
        for place, row in zip(images, rows, strict=True):
            place[: self.sizes[row][0], : self.sizes[row][1]] = self.images[row]
        heights, widths = self.sizes_on_device.index_select(0, at).unbind(1)
        below = torch.arange(height, device=at.device) >= heights[:, None]  # [B, H]
        right = torch.arange(width, device=at.device) >= widths[:, None]  # [B, W]
        return images.permute(0, 3, 1, 2), below[:, :, None] | right[:, None]


@dataclass(frozen=True)
class _Targets:
    """What samples have beside their images, on the device, and what the host needs of it.

    Attributes:
        packed: objects of all samples.
        largest_labels: of each sample, on the host; 0 where it has no object.
        original_sizes: ``[R, 2]``, see :class:`Batch`.
        normalization: of all images.
    """

    packed: PackedTargets
    largest_labels: list[int]
    original_sizes: Tensor
    normalization: Any

    @classmethod
    def of(cls, targets: Sequence[dict[str, Any]], device: torch.device) -> "_Targets":
        packed = PackedTargets.from_list(targets)
        largest = packed.labels.amax(1).tolist() if packed.max_targets else [0] * len(targets)
        sizes = torch.stack([target["original_size"] for target in targets])
        return cls(packed.to(device), largest, sizes.to(device), common_normalization(targets))

    def batch(self, rows: Sequence[int], at: Tensor) -> tuple[PackedTargets, Tensor, Any]:
        """Targets, original sizes and normalisation of these rows, which ``at`` has on the device."""
        numbers = tuple(self.packed.sizes[row] for row in rows)
        most = max(numbers)
        labels, boxes = (each[:, :most].index_select(0, at) for each in (self.packed.labels, self.packed.boxes))
        targets = PackedTargets(
            labels,
            boxes,
            self.packed.num_targets.index_select(0, at),
            numbers,
            largest_label=max(self.largest_labels[row] for row in rows) if most else None,
        )
        return targets, self.original_sizes.index_select(0, at), self.normalization


def _load(
    dataset: CocoDataset, transforms: Sequence[Transforms], sizes: list[tuple[int, int]], device: torch.device
) -> tuple[_Pixels, _Targets]:
    """All outcomes of all images; of images of ``sizes``, those of the first transforms first."""
    pixels = _Pixels.of(sizes, device)
    targets: list[dict[str, Any]] = [{}] * len(sizes)
    for index, samples in enumerate(dataset.outcomes(transforms)):
        for row, (image, target) in zip(range(index, len(sizes), len(dataset)), samples, strict=True):
            pixels.images[row].copy_(image.permute(1, 2, 0))
            targets[row] = target
    return pixels, _Targets.of(targets, device)
