"""Samples of different sizes in one padded batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..targets import PackedTargets

__all__ = ["Batch", "collate"]


@dataclass(frozen=True)
class Batch:
    """``B`` images, padded on the right and at the bottom to the largest height and width among them.

    Attributes:
        images: ``[B, 3, H, W]`` float32, 0 on padding.
        masks: ``[B, H, W]`` bool, True on padding.
        targets: labels and boxes, which are normalised by each image's own size, not by ``H`` and ``W``; and masks.
        image_ids: the images' ids in the annotation file.
        original_sizes: ``[B, 2]`` int64, ``(height, width)`` of the upright images in pixels.
    """

    images: Tensor
    masks: Tensor
    targets: PackedTargets
    image_ids: list[int]
    original_sizes: Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            masks=self.masks.to(device, non_blocking=non_blocking),
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
        samples: ``(image [3, H_b, W_b], target)`` pairs, at least one.
        min_size: smallest height and width of the batch; with that of a fixed crop, all batches have one shape.

    Raises:
        ValueError: if there are no samples, or a target does not fit :class:`PackedTargets`.
    """
    if not samples:
        raise ValueError("samples must hold at least one sample")
    images, targets = zip(*samples, strict=True)
    height, width = (max(min_size, *(image.shape[dim] for image in images)) for dim in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    masks = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        masks[index, : image.shape[1], : image.shape[2]] = False
    return Batch(
        images=batch,
        masks=masks,
        targets=PackedTargets.from_list(targets),
        image_ids=[target["image_id"] for target in targets],
        original_sizes=torch.stack([target["original_size"] for target in targets]),
    )
