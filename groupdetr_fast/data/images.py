"""Images of any kind as 8-bit RGB."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .annotations import DataError

__all__ = ["IMAGE_SUFFIXES", "ImageLike", "as_rgb", "decode_rgb"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


def decode_rgb(image: Image.Image) -> Tensor:
    """Pixels as stored: uint8 RGB ``[3, H, W]``.

    Grey images and palettes become colours, transparency is dropped, and 16 bits of grey are scaled to 8, where
    Pillow's own conversion would turn everything above 255 white.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def as_rgb(image: ImageLike) -> Tensor:
    """An image in any of the usual forms, the right way up.

    Args:
        image: a path; a PIL image; an array ``[H, W]`` or ``[H, W, C]``; a tensor ``[H, W]`` or ``[C, H, W]``; with 1,
            3 (RGB) or 4 (RGBA) channels, of uint8 or of floats in [0, 1]. The EXIF orientation of files and PIL images
            is applied.

    Returns:
        uint8 RGB ``[3, H, W]``.

    Raises:
        DataError: for a file that is missing or damaged; the message names it.
        ValueError: for an array or a tensor of another shape, type or range.
        TypeError: for anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return decode_rgb(ImageOps.exif_transpose(image))
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        return _check_pixels(pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels, "an array [H, W(, C)]")
    if isinstance(image, Tensor):
        return _check_pixels(image.detach().cpu(), "a tensor [(C, )H, W]")
    raise TypeError(f"expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as file:
            return decode_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        raise DataError(f"image file {path} does not exist") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise DataError(f"image file {path} cannot be read ({error})") from None


def _check_pixels(pixels: Tensor, expected: str) -> Tensor:
    shape = list(pixels.shape)
    if pixels.dim() == 2:
        pixels = pixels[None]
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3, 4) or pixels.numel() == 0:
        raise ValueError(f"expected {expected} with 1, 3 or 4 channels, got the shape {shape} (channels first)")
    if pixels.is_floating_point():
        # written so that it also refuses what is not a number
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError("pixels that are floats must lie in [0, 1]; give others as uint8")
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 or floats, got {pixels.dtype}")
    return pixels[:3].expand(3, -1, -1)
