"""Samples of different sizes in one padded batch."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..targets import PackedTargets
from .normalization import Normalization

__all__ = ["Batch", "collate", "common_normalization"]

SCALED = Normalization()  # of samples that say nothing of theirs

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Batch:
    """``B`` images, padded on the right and at the bottom to the largest height and width among them.

    As :func:`collate` makes it, a batch has the pixels as bytes. :meth:`to` makes a detector's input of them, on the
    device.

    Attributes:
        images: ``[B, 3, H, W]`` uint8, or float32 where they are normalised; 0 on padding either way.
        masks: ``[B, H, W]`` bool, True on padding.
        targets: labels and boxes, which are normalised by each image's own size, not by ``H`` and ``W``; and masks.
        image_ids: the images' ids in the annotation file.
        original_sizes: ``[B, 2]`` int64, ``(height, width)`` of the upright images in pixels.
        normalization: of images that are bytes.
    """

    images: Tensor
    masks: Tensor
    targets: PackedTargets
    image_ids: list[int]
    original_sizes: Tensor
    normalization: Normalization = SCALED

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device, its images normalised there: what a detector takes."""
        images, masks = (each.to(device, non_blocking=non_blocking) for each in (self.images, self.masks))
        return replace(
            self,
            images=images if images.is_floating_point() else self.normalization(images, masks),
            masks=masks,
            targets=self.targets.to(device, non_blocking=non_blocking),
            original_sizes=self.original_sizes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory; ``DataLoader(pin_memory=True)`` calls this."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("images", "masks", "targets", "original_sizes")}
        return replace(self, **pinned)


def collate(samples: Sequence[tuple[Tensor, Mapping[str, Any]]], *, min_size: int = 0) -> Batch:
    """Batch samples of :class:`CocoDataset`; the ``collate_fn`` of a DataLoader.

    Args:
        samples: ``(image [3, H_b, W_b], target)`` pairs, at least one. The images are uint8; floats are taken for
            normalised.
        min_size: smallest height and width of the batch; with that of a fixed crop, all batches have one shape.

    Raises:
        ValueError: if there are no samples, images differ in their type or normalisation, or a target does not fit
            :class:`PackedTargets`.
    """
    if not samples:
        raise ValueError("samples must hold at least one sample")
    images, targets = zip(*samples, strict=True)
    height, width = (max(min_size, *(image.shape[dim] for image in images)) for dim in (1, 2))
    packed = PackedTargets.from_list(targets)
    sizes = torch.stack([target["original_size"] for target in targets])
    small = (packed.labels, packed.boxes, packed.num_targets, sizes, *(packed.masks or ()))
    # Bytes lie in memory as decoders write them, colours innermost, since turning them costs more than copying them.
    inner_colours = images[0].dtype == torch.uint8
    shape = (len(images), height, width, 3) if inner_colours else (len(images), 3, height, width)
    wanted = [(shape, images[0].dtype), ((len(images), height, width), torch.bool)]
    batch, masks, *copies = _zeros([*wanted, *((each.shape, each.dtype) for each in small)])
    batch = batch.permute(0, 3, 1, 2) if inner_colours else batch
    _fill(batch, masks, images)
    for room, each in zip(copies, small, strict=True):
        room.copy_(each)
    labels, boxes, num_targets, sizes, *of_targets = copies
    target_masks = None if packed.masks is None else tuple(of_targets)
    return Batch(
        images=batch,
        masks=masks,
        targets=replace(packed, labels=labels, boxes=boxes, num_targets=num_targets, masks=target_masks),
        image_ids=[target["image_id"] for target in targets],
        original_sizes=sizes,
        normalization=common_normalization(targets),
    )


def _fill(batch: Tensor, masks: Tensor, images: Sequence[Tensor]) -> None:
    """Put images ``[3, H_b, W_b]`` into zeros ``[B, 3, H, W]``, and True into ``[B, H, W]`` where none is."""
    for index, image in enumerate(images):
        if image.dtype != batch.dtype:
            raise ValueError(f"images of a batch must have one type, got {batch.dtype} and {image.dtype}")
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        masks[index, image.shape[1] :] = True
        masks[index, : image.shape[1], image.shape[2] :] = True


def _zeros(wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Tensors of zeros of these shapes and types.

    In a process that loads images they lie in one block of memory that the training process sees too: nothing is
    copied on the way, and for each block, not for each tensor, a connection is made that hands it over.
    """
    if get_worker_info() is None:
        return [torch.zeros(tuple(shape), dtype=dtype) for shape, dtype in wanted]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    block = torch.empty(0, dtype=torch.uint8)
    block.set_(torch.UntypedStorage._new_shared(max(starts[-1], 1)), 0, (starts[-1],), (1,))  # new memory is zeros
    return [
        block[start : start + size].view(dtype).view(tuple(shape))
        for start, size, (shape, dtype) in zip(starts, sizes, wanted, strict=False)
    ]


def common_normalization(targets: Sequence[Mapping[str, Any]]) -> Normalization:
    """The normalisation of all samples; by default pixels are only scaled to [0, 1].

    Raises:
        ValueError: if samples have different ones.
    """
    found = {target.get("normalization", SCALED) for target in targets}
    if len(found) > 1:
        raise ValueError(f"images of a batch must have one normalisation, got {sorted(map(str, found))}")
    return found.pop()
