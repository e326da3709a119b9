"""Images of any kind as 8-bit RGB, the right way up.

Cameras store pixels as the sensor lay and say in an EXIF tag how to turn them. That orientation is applied here,
wherever an image is read, so that training, evaluation and prediction see what a person sees and annotates.
"""

import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from .annotations import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "ChannelOrder",
    "ImageLike",
    "as_rgb",
    "decode_rgb",
    "is_turned",
    "open_image",
    "size_fault",
    "upright_size",
]

_HAS_AVIF = find_spec("PIL.AvifImagePlugin") is not None  # since Pillow 11.3

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
    | ({".avif"} if _HAS_AVIF else set())
)

# What files are read as, whatever they are called. Pillow knows more formats, of which some (EPS) run other programs.
_FORMATS: tuple[str, ...] = (
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # MPO, of two cameras, is read as JPEG
if _HAS_AVIF:
    _FORMATS += ("AVIF",)

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

ChannelOrder = Literal["rgb", "bgr"]
IMAGE_LIKE = (str, os.PathLike, Image.Image, np.ndarray, Tensor)  # for isinstance
ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

# By EXIF orientation: what makes the stored pixels upright; from 5 on, width and height change places.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises for tags that have another beginning than a TIFF, end within an entry, or are a text that is not
# hexadecimal; and for a damaged PNG, which it decodes to look for tags behind the pixels.
_DAMAGED_TAGS = (SyntaxError, struct.error, ValueError, OSError)


def open_image(path: Path) -> Image.Image:
    """Open a raster image; every image file is opened here.

    Raises:
        OSError: if the file cannot be opened or is of no known format. Decoders raise anything else on damaged files.
    """
    try:
        return Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"it is none of {', '.join(_FORMATS)}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED_TAGS:  # beside which the pixels may be whole
        return 1


def is_turned(image: Image.Image) -> bool:
    """Whether an opened file, whose pixels are not loaded yet, is stored otherwise than upright."""
    return _orientation(image) in _TURNS


def upright_size(image: Image.Image) -> tuple[int, int]:
    """``(width, height)`` that :func:`decode_rgb` gives for an opened file whose pixels are not loaded yet."""
    width, height = image.size
    if isinstance(
        image, TiffImagePlugin.TiffImageFile
    ):  # of which some versions of Pillow give the upright size, and some the stored one
        width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def size_fault(size: tuple[int, int], stated: tuple[int, int], turned: bool, source: str) -> str | None:
    """What is wrong with the size of an image; the sentence continues after the name of the file.

    Args:
        size: ``(width, height)`` of the upright image.
        stated: the same in its annotations.
        turned: whether the file is stored otherwise than upright.
        source: whose size is ``stated``.

    Returns:
        None if the sizes are equal.
    """
    if size == stated:
        return None
    fault = f"is {size[0]} x {size[1]} pixels, but {source} says {stated[0]} x {stated[1]}"
    if turned and size == stated[::-1]:
        fault += (
            ", which fits the pixels as they are stored: their EXIF orientation is applied, so annotate the upright "
            "image, or remove the orientation from the file"
        )
    return fault


def decode_rgb(image: Image.Image) -> Tensor:
    """Pixels, the right way up: uint8 RGB ``[3, H, W]``.

    The EXIF orientation is applied. Grey images and palettes become colours, transparency is dropped, and 16 bits of
    grey are scaled to 8, where Pillow's own conversion would turn everything above 255 white. So are floats in [0, 1],
    which it would turn black; other floats in [0, 255] are rounded.

    Raises:
        ValueError: for floats beyond [0, 255].
    """
    image.load()  # which turns TIFFs already
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_floats_to_bytes(np.asarray(image)))
    if image.mode != "RGB":  # the conversion would copy
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _floats_to_bytes(values: np.ndarray) -> np.ndarray:
    # written so that it also refuses what is not a number
    if not ((values >= 0) & (values <= 255)).all():
        raise ValueError("its pixels are floats beyond [0, 255]; store it with 8 or 16 bits, or with floats in [0, 1]")
    return (values * (255 if values.max() <= 1 else 1)).round().astype(np.uint8)


def as_rgb(image: ImageLike, *, channel_order: ChannelOrder = "rgb") -> Tensor:
    """An image in any of the usual forms, the right way up.

    Args:
        image: a path; a PIL image; an array ``[H, W]`` or ``[H, W, C]``; a tensor ``[H, W]`` or ``[C, H, W]``; with 1,
            3 (RGB) or 4 (RGBA) channels, of uint8 or of floats in [0, 1]. The EXIF orientation of files and PIL images
            is applied.
        channel_order: of the colours in arrays and tensors; "bgr" for those that OpenCV reads. Files and PIL images
            know theirs.

    Returns:
        uint8 RGB ``[3, H, W]``.

    Raises:
        DataError: for a file that is missing or damaged, for a folder and for an address; the message names it.
        ValueError: for an array or a tensor of another shape, type or range, and for another ``channel_order``.
        TypeError: for anything else.
    """
    if channel_order not in get_args(ChannelOrder):
        raise ValueError(f'channel_order must be "rgb" or "bgr", got {channel_order!r}')
    if isinstance(image, str) and "://" in image:
        raise DataError(f"images are not loaded from addresses: download {image}, and give its file")
    if isinstance(image, (str, os.PathLike)):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return decode_rgb(image)
    if isinstance(image, np.ndarray):
        # torch warns of arrays that are read-only, though nothing is written here
        pixels = torch.from_numpy(np.ascontiguousarray(image if image.flags.writeable else image.copy()))
        if pixels.dim() == 3:
            if pixels.shape[0] in _CHANNELS and pixels.shape[2] > max(_CHANNELS):
                shape = list(image.shape)
                raise ValueError(f"the array {shape} has its channels first: give array.transpose(1, 2, 0), [H, W, C]")
            pixels = pixels.permute(2, 0, 1)
        pixels = _check_pixels(pixels, "an array [H, W(, C)]", list(image.shape))
        return pixels.flip(0) if channel_order == "bgr" else pixels
    if isinstance(image, Tensor):
        shape = list(image.shape)
        if len(shape) == 3 and shape[2] in _CHANNELS and shape[0] > max(_CHANNELS):
            raise ValueError(f"the tensor {shape} has its channels last: give tensor.permute(2, 0, 1), [C, H, W]")
        pixels = _check_pixels(image.detach().cpu(), "a tensor [(C, )H, W]", shape)
        return pixels.flip(0) if channel_order == "bgr" else pixels
    hint = ": open them by PIL.Image.open(io.BytesIO(...))" if isinstance(image, (bytes, bytearray)) else ""
    raise TypeError(f"expected a path, a PIL image, an array or a tensor, got {type(image).__name__}{hint}")


def _read(path: Path) -> Tensor:
    try:
        with open_image(path) as file:
            return decode_rgb(file)
    except FileNotFoundError:
        raise DataError(f"image file {path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not an image: give the files in it") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise DataError(f"image file {path} cannot be read ({error})") from None


def _check_pixels(pixels: Tensor, expected: str, shape: list[int]) -> Tensor:
    if pixels.dim() == 2:
        pixels = pixels[None]
    if pixels.dim() != 3 or pixels.shape[0] not in _CHANNELS or pixels.numel() == 0:
        raise ValueError(f"expected {expected} with 1, 3 or 4 channels, got the shape {shape}")
    if pixels.is_floating_point():
        # written so that it also refuses what is not a number
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError("pixels that are floats must lie in [0, 1]; give others as uint8")
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 or floats, got {pixels.dtype}")
    return pixels[:3].expand(3, -1, -1)
