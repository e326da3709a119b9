"""The augmentation of DETR and Group DETR (section 4.1), from torchvision.transforms.v2."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..field_types import take_field_types
from .normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization
from .own_transforms import OwnTransforms, split_name

__all__ = ["EVAL_SETTINGS", "AugmentationConfig", "eval_transforms", "train_transforms"]

# The settings of AugmentationConfig that inference needs; checkpoints carry them under "evaluation".
EVAL_SETTINGS = ("square", "eval_short_side", "eval_max_size", "image_mean", "image_std")
LEAST_SIDE = 8  # pixels; backbones reduce images to nothing that are smaller


@dataclass(frozen=True)
class AugmentationConfig:
    """Sizes in pixels and probabilities. The defaults are the paper's; a small-resolution run changes the sizes only.

    Attributes:
        short_sides: the short side of a training image is one of these, with equal probability.
        max_size: limit on the long side, or None; it takes precedence over the short side.
        square: resize images to squares, in training and evaluation, whatever their aspect ratio: the sizes above and
            in evaluation are then their sides, and the limits on the long side do not count.
        crop_short_sides: short sides before a crop.
        crop_min: smallest side of a crop; a shorter image side is kept whole.
        crop_max: largest side of a crop.
        flip: probability of a horizontal flip.
        crop: probability of the branch that resizes to ``crop_short_sides`` and crops, before the final resize.
        jitter_size: None, or the side of the square of large-scale jitter, which then takes the place of all of the
            above but the flip (Mask2Former: 1024).
        jitter_scale: smallest and largest scale of the images, relative to their fit into that square.
        transforms: an augmentation of one's own, which comes before all of the above: ``FILE.py:FUNCTION``, whose
            function returns a torchvision.transforms.v2 transform. None for none. With ``flip`` and ``crop`` 0 it takes
            the place of the above, of which the resize alone is left.
        copy_paste: probability that objects of another image are pasted into an image, by their masks.
        copy_paste_prefer_small: paste all small objects (below 32 x 32 pixels), half of the medium ones and none from
            96 x 96 pixels on, instead of half of all.
        eval_short_side: short side in evaluation.
        eval_max_size: limit on the long side in evaluation, or None.
        image_mean: mean of red, green and blue, in [0, 1], that the backbone was trained with.
        image_std: standard deviation of red, green and blue, likewise.

    Raises:
        ValueError: for a value of another type, an empty list, a size below 8 pixels, limits that are not ascending, a
            probability outside [0, 1], a scale or a standard deviation that is not positive, a mean or a deviation that
            is not finite, or ``transforms`` without file and function.
    """

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int | None = 1333
    square: bool = False
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_min: int = 384
    crop_max: int = 600
    flip: float = 0.5
    crop: float = 0.5
    jitter_size: int | None = None
    jitter_scale: tuple[float, float] = (0.1, 2.0)
    transforms: str | None = None
    copy_paste: float = 0.0
    copy_paste_prefer_small: bool = False
    eval_short_side: int = 800
    eval_max_size: int | None = 1333
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    @property
    def normalization(self) -> Normalization:
        """What makes a detector's input of the pixels of a batch."""
        return Normalization(self.image_mean, self.image_std)

    def __post_init__(self) -> None:
        take_field_types(self, AugmentationConfig)
        for name in ("short_sides", "crop_short_sides"):
            if not getattr(self, name) or min(getattr(self, name)) < LEAST_SIDE:
                raise ValueError(f"{name} must hold sizes of at least {LEAST_SIDE} pixels, got {getattr(self, name)}")
        for name in ("max_size", "crop_min", "crop_max", "jitter_size", "eval_short_side", "eval_max_size"):
            value = getattr(self, name)
            if value is not None and value < LEAST_SIDE:
                raise ValueError(f"{name} must be at least {LEAST_SIDE} pixels, got {value}")
        if self.crop_min > self.crop_max:
            raise ValueError(f"crop_min must not exceed crop_max, got {self.crop_min} > {self.crop_max}")
        if not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ValueError(f"jitter_scale must be positive and ascending, got {self.jitter_scale}")
        for name in ("flip", "crop", "copy_paste"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {getattr(self, name)}")
        if self.transforms is not None:
            split_name(self.transforms)  # which checks it
        if self.copy_paste_prefer_small and not self.copy_paste:
            raise ValueError("copy_paste_prefer_small chooses what copy_paste pastes: give copy_paste a probability")
        if not all(0 < each < math.inf for each in self.image_std):
            raise ValueError(f"image_std must be positive and finite, got {self.image_std}")
        if not all(map(math.isfinite, self.image_mean)):
            raise ValueError(f"image_mean must be finite, got {self.image_mean}")


def train_transforms(config: AugmentationConfig | None = None, own: OwnTransforms | None = None) -> v2.Transform:
    """Flip, resize, with a crop in between for a part of the images; or large-scale jitter.

    The transform takes and returns ``(image, {"boxes": BoundingBoxes [T, 4], "labels": [T]})``, and in the dictionary
    also ``"masks": Mask [T, H, W]``; objects of which a crop leaves less than a pixel of the box are removed. Images
    are and stay uint8: how they are to be normalised is added to the dictionary under ``"normalization"``, and
    :class:`Batch` does it on the device. Random numbers come from torch's CPU generator.

    Args:
        config: sizes and probabilities.
        own: the transform that ``config.transforms`` names; it comes first.
    """
    config = config or AugmentationConfig()
    steps: list[Any] = [] if own is None else [own]
    if config.flip > 0:
        steps.append(RandomHorizontalFlip(config.flip))
    if config.jitter_size is not None:
        size = config.jitter_size
        steps += [ScaleJitter((size, size), config.jitter_scale), RandomSizeCrop(size, size)]
        steps.append(v2.SanitizeBoundingBoxes())
        return v2.Compose([*steps, SayNormalization(config.normalization)])
    if config.crop > 0:
        crop = [
            ResizeShortSide(config.crop_short_sides),
            RandomSizeCrop(config.crop_min, config.crop_max),
            # Here, where boxes are clamped exactly, and not after the next resize: rounding may put a corner a hair
            # outside the canvas, and the sanitizer drops such boxes.
            v2.SanitizeBoundingBoxes(),
        ]
        steps.append(v2.RandomApply(crop, config.crop))
    steps.append(_resize(config, config.short_sides, config.max_size))
    return v2.Compose([*steps, SayNormalization(config.normalization)])


def eval_transforms(config: AugmentationConfig | None = None) -> v2.Transform:
    """Resize to the evaluation size; the boxes follow, and the normalisation is said as in training."""
    config = config or AugmentationConfig()
    resize = _resize(config, (config.eval_short_side,), config.eval_max_size)
    return v2.Compose([resize, SayNormalization(config.normalization)])


class RandomHorizontalFlip(v2.RandomHorizontalFlip):
    """torchvision's flip, for images whose colours lie innermost in memory."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return super().transform(inpt, params)
        return _rearranged(inpt, lambda pixels: pixels.flip(1))


def _rearranged(image: tv_tensors.Image, change: Callable[[torch.Tensor], torch.Tensor]) -> tv_tensors.Image:
    """What becomes of pixels ``[H, W, 3]``, whose colours lie innermost in memory as decoders write them.

    A change of ``[3, H, W]`` would bring the colours outermost, and to resize and to collate such images takes twice
    as long.
    """
    pixels = change(image.as_subclass(torch.Tensor).permute(1, 2, 0)).contiguous()
    return tv_tensors.wrap(pixels.permute(2, 0, 1), like=image)


def _resize(config: AugmentationConfig, short_sides: tuple[int, ...], max_size: int | None) -> v2.Transform:
    return ResizeSquare(short_sides) if config.square else ResizeShortSide(short_sides, max_size)


class ResizeShortSide(v2.Transform):
    """Resize, keeping the aspect ratio, so that the short side has a size drawn from ``short_sides``.

    Unlike ``v2.RandomShortestSize``, which truncates both sides after a division, the short side gets exactly that
    size, or, where ``max_size`` limits it, the long side gets exactly ``max_size``.
    """

    def __init__(self, short_sides: tuple[int, ...], max_size: int | None = None):
        super().__init__()
        self.short_sides = tuple(short_sides)
        self.max_size = max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = v2.query_size(flat_inputs)
        target = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        short, long = min(size), max(size)
        if self.max_size is not None and target * long > self.max_size * short:
            short, long = max(1, round(self.max_size * short / long)), self.max_size
        else:
            short, long = target, target * long // short
        return {"size": [short, long] if size[0] <= size[1] else [long, short]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return _resized_mask(inpt, params)
        return self._call_kernel(F.resize, inpt, **params)


class ResizeSquare(ResizeShortSide):
    """Resize to a square whose side is drawn from ``short_sides``; the aspect ratio is not kept."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        side = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        return {"size": [side, side]}


class ScaleJitter(v2.ScaleJitter):
    """torchvision's jitter, with masks that stay where their objects are."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resized_mask(inpt, params) if isinstance(inpt, tv_tensors.Mask) else super().transform(inpt, params)


def _resized_mask(mask: tv_tensors.Mask, params: dict[str, Any]) -> tv_tensors.Mask:
    """Masks resized with aligned centres, as images are.

    ``F.resize`` takes the pixel at the corner for a mask, and so moves it right and down by up to half a pixel.
    """
    pixels = mask.as_subclass(torch.Tensor)
    return tv_tensors.wrap(F.resize_image(pixels, params["size"], v2.InterpolationMode.NEAREST_EXACT), like=mask)


class RandomSizeCrop(v2.Transform):
    """Crop a rectangle whose sides are drawn uniformly from ``[min_side, max_side]``, at a random position.

    A limit beyond the image side is lowered to it.
    """

    def __init__(self, min_side: int, max_side: int):
        super().__init__()
        self.min_side = min_side
        self.max_side = max_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image_height, image_width = v2.query_size(flat_inputs)
        height, width = self._side(image_height), self._side(image_width)
        top = int(torch.randint(image_height - height + 1, ()))
        left = int(torch.randint(image_width - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def _side(self, available: int) -> int:
        low, high = min(self.min_side, available), min(self.max_side, available)
        return int(torch.randint(low, high + 1, ()))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return self._call_kernel(F.crop, inpt, **params)
        top, left = params["top"], params["left"]
        return _rearranged(inpt, lambda pixels: pixels[top : top + params["height"], left : left + params["width"]])


class SayNormalization(v2.Transform):
    """Adds to the dictionary beside an image how it is to be normalised."""

    def __init__(self, normalization: Normalization):
        super().__init__()
        self.normalization = normalization

    def forward(self, image: Any, objects: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return image, {**objects, "normalization": self.normalization}
