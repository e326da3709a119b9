"""Objects of one image pasted into another: simple copy-paste (Ghiasi et al. 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from .annotations import MEDIUM, SMALL

__all__ = ["CopyPaste"]

CHANCE = 0.5  # of each object to be pasted
LEAST_VISIBLE = 0.1  # of an object's pixels, with less of which it is no target any more


@dataclass(frozen=True)
class CopyPaste:
    """Pastes objects by their masks; nothing is blended, which gains nothing according to the paper.

    Both images are augmented before, each by itself. The image with the objects lies at a random place on the other, or
    the other on it where it is larger. Random numbers come from torch's CPU generator.

    Attributes:
        probability: that objects are pasted into an image.
        prefer_small: paste all small objects (less than 32 x 32 pixels), half of the medium ones, and none from 96 x 96
            pixels on, which would hide what is there; otherwise half of all.
    """

    probability: float
    prefer_small: bool = False

    def draws(self) -> bool:
        """Whether objects are pasted into the next image."""
        return bool(torch.rand(()) < self.probability)

    def __call__(
        self, image: Tensor, objects: dict[str, Any], source: Tensor, pasted: dict[str, Any]
    ) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Paste.

        Args:
            image: uint8 ``[3, H, W]``; it is not changed.
            objects: of this image: ``labels [T]``, ``boxes`` (``tv_tensors.BoundingBoxes [T, 4]``, xyxy) and ``masks``
                (``tv_tensors.Mask [T, H, W]``); other entries stay as they are.
            source: uint8 ``[3, h, w]``, the image that the pasted objects are taken from.
            pasted: its objects.

        Returns:
            A new image and its objects. Masks of objects that are covered lack what is covered, and their boxes are
            those of what is left; objects of which less than a tenth is left are removed. The pasted ones come last.
        """
        size, its_size = image.shape[1:], source.shape[1:]
        top, left = (_offset(own, other) for own, other in zip(size, its_size, strict=True))
        here = _window(top, its_size[0], size[0]), _window(left, its_size[1], size[1])
        there = _window(-top, size[0], its_size[0]), _window(-left, size[1], its_size[1])
        masks = pasted["masks"].as_subclass(Tensor).bool()
        chosen = self._choose(masks) & masks[:, there[0], there[1]].flatten(1).any(1)
        cut = masks[chosen][:, there[0], there[1]]
        moved = torch.zeros(len(cut), *size, dtype=torch.bool)
        moved[:, here[0], here[1]] = cut
        cover = moved.any(0)
        pixels = image.as_subclass(Tensor).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        window = cover[here[0], here[1]]
        pixels[here[0], here[1]][window] = source.as_subclass(Tensor)[:, there[0], there[1]].permute(1, 2, 0)[window]
        kept, boxes, visible = _uncovered(objects, cover)
        new_boxes = pasted["boxes"].as_subclass(Tensor)[chosen] + torch.tensor([left, top, left, top])
        limits = torch.tensor([size[1], size[0], size[1], size[0]])
        together = {
            "labels": torch.cat((objects["labels"][kept], pasted["labels"][chosen])),
            "boxes": tv_tensors.wrap(torch.cat((boxes, new_boxes.clamp(min=0).minimum(limits))), like=objects["boxes"]),
            "masks": tv_tensors.Mask(torch.cat((visible, moved)).to(objects["masks"].dtype)),
        }
        return tv_tensors.Image(pixels.permute(2, 0, 1)), {**objects, **together}

    def _choose(self, masks: Tensor) -> Tensor:
        """Which of the objects with these masks ``[S, h, w]`` are pasted, ``[S]`` bool: one at least, if one can be."""
        chances = torch.full((len(masks),), CHANCE)
        if self.prefer_small:
            areas = masks.flatten(1).sum(1)
            chances = chances.masked_fill(areas < SMALL, 1.0).masked_fill(areas >= MEDIUM, 0.0)
        numbers = torch.rand(len(masks))
        chosen = numbers < chances
        if not chosen.any() and chances.any():
            chosen[numbers.masked_fill(chances == 0, 1.0).argmin()] = True
        return chosen


def _offset(size: int, other: int) -> int:
    """Where a side of length ``other`` begins on one of length ``size``; negative where it is the longer one."""
    low, high = sorted((0, size - other))
    return int(torch.randint(low, high + 1, ()))


def _window(offset: int, length: int, size: int) -> slice:
    """The part of a side of length ``size`` on which another one lies, which begins at ``offset``."""
    return slice(max(offset, 0), min(offset + length, size))


def _uncovered(objects: dict[str, Any], cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which objects stay ``[T]``, and of these the boxes and the masks of what is not covered by ``cover [H, W]``."""
    masks, boxes = objects["masks"].as_subclass(Tensor).bool(), objects["boxes"].as_subclass(Tensor)
    visible = masks & ~cover
    before, after = masks.flatten(1).sum(1), visible.flatten(1).sum(1)
    kept = after >= LEAST_VISIBLE * before
    covered = (after < before)[kept]
    boxes, visible = boxes[kept].clone(), visible[kept]
    if covered.any():
        tight = masks_to_boxes(visible[covered]).to(boxes.dtype)
        tight[:, 2:] += 1  # from the last pixel to its far edge
        boxes[covered] = tight
    return kept, boxes, visible
