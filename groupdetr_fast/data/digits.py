"""The embedded set: scenes of handwritten digits, composed on this machine from scikit-learn's UCI digits."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .cache import cache_root, made_once

__all__ = ["DigitsConfig", "DigitsPaths", "digits_dataset"]

# Part of the cache folder's name: raise it whenever the same config gives other pixels or boxes.
_VERSION = 1
_VAL_SHARE = 0.2
_PLACEMENT_TRIES = 20
# Where the digit covers at least this share of a pixel, the pixel is its ink.
_INK = 0.5
# Least difference in brightness (0 to 1) between a digit and what lies under it.
_MIN_CONTRAST = 0.25
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class DigitsConfig:
    """What the scenes look like; sizes in pixels.

    Attributes:
        image_size: side of the square images.
        train_images: number of training scenes.
        val_images: number of held-out scenes; they show other handwritten digits than the training scenes.
        min_objects: fewest digits tried per scene; a digit that finds no place is left out, the first always has one.
        max_objects: most digits per scene.
        min_digit: smallest height of a digit before it is turned by up to 12 degrees.
        max_digit: largest height; small heights are more frequent (uniform in the logarithm).
        max_overlap: largest intersection of two digits' boxes, as a share of the smaller box; also the largest share
            of its ink that later digits may hide.
        seed: not negative.

    Raises:
        ValueError: for sizes or counts that make no scene.
    """

    image_size: int = 96
    train_images: int = 3000
    val_images: int = 300
    min_objects: int = 1
    max_objects: int = 6
    min_digit: int = 16
    max_digit: int = 48
    max_overlap: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train_images, self.val_images) < 1:
            raise ValueError("train_images and val_images must be at least 1")
        if not 1 <= self.min_objects <= self.max_objects:
            raise ValueError(f"need 1 <= min_objects <= max_objects, got {self.min_objects} and {self.max_objects}")
        # A turned digit is up to a third larger than its height.
        if not 8 <= self.min_digit <= self.max_digit <= 0.75 * self.image_size:
            raise ValueError(
                "need 8 <= min_digit <= max_digit <= 3/4 image_size, "
                f"got {self.min_digit}, {self.max_digit} and {self.image_size}"
            )
        if not 0 <= self.max_overlap < 1:
            raise ValueError(f"max_overlap must be in [0, 1), got {self.max_overlap}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


class DigitsPaths(NamedTuple):
    """Where the set lies: two image folders and their COCO json files."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path


def digits_dataset(root: str | Path | None = None, *, config: DigitsConfig | None = None) -> DigitsPaths:
    """Compose the set, or find it where an earlier call left it.

    Ten categories, ids 1 to 10 named "0" to "9"; the boxes are tight to the visible ink. The same config gives the
    same bytes. It may be interrupted, or called by several processes at once, see ``cache.made_once``.

    Args:
        root: folder of the cache, by default ``cache.cache_root()``.
        config: defaults to ``DigitsConfig()``: 3000 + 300 images, 10 to 20 seconds on one core.

    Raises:
        OSError: if the folder cannot be written.
    """
    config = config or DigitsConfig()
    root = Path(root) if root is not None else cache_root()
    digest = hashlib.sha256(json.dumps([_VERSION, asdict(config)], sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"digits-{digest}"
    made_once(folder, lambda unfinished: _write(unfinished, config))
    return DigitsPaths(
        folder / "train", folder / "annotations" / "train.json", folder / "val", folder / "annotations" / "val.json"
    )


def _write(folder: Path, config: DigitsConfig) -> None:
    glyphs, classes = _glyphs()
    order = np.random.default_rng(config.seed).permutation(len(glyphs))
    held_out = round(_VAL_SHARE * len(glyphs))
    (folder / "annotations").mkdir()
    splits = (("train", order[held_out:], config.train_images), ("val", order[:held_out], config.val_images))
    for stream, (split, digits, count) in enumerate(splits):
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            # A generator per scene: a set with more images begins with the scenes of the smaller set.
            rng = np.random.default_rng([config.seed, stream, image_id])
            pixels, objects = _scene(rng, config, glyphs, digits)
            name = f"{image_id:06d}.png"
            Image.fromarray(pixels).save(folder / split / name, compress_level=1)
            images.append({"id": image_id, "file_name": name, "width": config.image_size, "height": config.image_size})
            for digit, (x, y, width, height) in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(classes[digit]) + 1,
                        "bbox": [x, y, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                        "digit": int(digit),
                    }
                )
        content = {
            "info": {"description": "handwritten digits on textured canvases", "config": asdict(config)},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": value + 1, "name": str(value), "supercategory": "digit"} for value in range(10)],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def _glyphs() -> tuple[list[Image.Image], np.ndarray]:
    """The 1797 UCI digits as grey images, cropped to their ink with one empty pixel around it, and their classes."""
    from sklearn.datasets import load_digits  # takes seconds, which only composing the set should cost

    data = load_digits()
    glyphs = []
    for pixels in data.images:
        rows, columns = np.flatnonzero(pixels.max(axis=1) >= 4), np.flatnonzero(pixels.max(axis=0) >= 4)
        ink = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        glyphs.append(Image.fromarray(np.pad(np.round(ink * (255 / 16)), 1).astype(np.uint8)))
    return glyphs, data.target


_Box = tuple[int, int, int, int]  # x, y, width, height in pixels


class _Placed:
    """A digit on the canvas: its ink without what later digits hide, bool ``[S, S]``, and the box of that."""

    def __init__(self, digit: int, ink: np.ndarray):
        self.digit = digit
        self.visible = ink
        self.box = _box(ink)
        self.ink = int(ink.sum())

    def hide(self, ink: np.ndarray) -> None:
        self.visible = self.visible & ~ink
        self.box = _box(self.visible)


def _scene(
    rng: np.random.Generator, config: DigitsConfig, glyphs: list[Image.Image], digits: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, _Box]]]:
    """One image ``[S, S, 3]`` uint8, and its digits with their boxes."""
    canvas = _background(rng, config.image_size)
    placed: list[_Placed] = []
    for _ in range(int(rng.integers(config.min_objects, config.max_objects + 1))):
        digit = int(rng.choice(digits))
        cover = _cover(rng, glyphs[digit], config)
        found = _find_place(rng, cover > _INK, placed, config)
        if found is None:
            continue
        top, left, ink = found
        _paint(rng, canvas[top : top + cover.shape[0], left : left + cover.shape[1]], cover[..., None])
        for other in placed:
            other.hide(ink)
        placed.append(_Placed(digit, ink))
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels, [(item.digit, item.box) for item in placed]


def _find_place(
    rng: np.random.Generator, ink: np.ndarray, placed: list[_Placed], config: DigitsConfig
) -> tuple[int, int, np.ndarray] | None:
    """A free place for the ink ``[h, w]``: its corner, and the ink on the canvas, ``[S, S]``."""
    height, width = ink.shape
    x, y, box_width, box_height = _box(ink)
    for _ in range(_PLACEMENT_TRIES):
        top = int(rng.integers(config.image_size - height + 1))
        left = int(rng.integers(config.image_size - width + 1))
        box = (left + x, top + y, box_width, box_height)
        overlapping = [other for other in placed if _overlap(box, other.box) > 0]
        if any(_overlap(box, other.box) > config.max_overlap * _smaller(box, other.box) for other in overlapping):
            continue
        on_canvas = np.zeros((config.image_size, config.image_size), dtype=bool)
        on_canvas[top : top + height, left : left + width] = ink
        if all((other.visible & ~on_canvas).sum() >= (1 - config.max_overlap) * other.ink for other in overlapping):
            return top, left, on_canvas
    return None


def _overlap(first: _Box, second: _Box) -> int:
    """Area of the intersection of two boxes."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _smaller(first: _Box, second: _Box) -> int:
    """Area of the smaller of two boxes."""
    return min(first[2] * first[3], second[2] * second[3])


def _box(mask: np.ndarray) -> _Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1


def _cover(rng: np.random.Generator, glyph: Image.Image, config: DigitsConfig) -> np.ndarray:
    """How much of each pixel a digit covers, float32 ``[h, w]`` in [0, 1], at a random size, slant and angle."""
    height = math.exp(rng.uniform(math.log(config.min_digit), math.log(config.max_digit)))
    # The glyph's own ratio of width to height, with its margin, changed by up to a fifth.
    width = height * glyph.width / glyph.height * math.exp(rng.uniform(-0.2, 0.2))
    enlarged = glyph.resize((max(4, round(width)), round(height)), Image.Resampling.BICUBIC)
    turned = enlarged.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    grey = np.asarray(turned, dtype=np.float32) / 255
    # From the blurred enlargement to a stroke with a soft edge; the threshold sets how thick it is.
    threshold = rng.uniform(0.38, 0.52)
    cover = ((grey - threshold) / 0.3 + 0.5).clip(0, 1)
    x, y, width, height = _box(cover > 0.05)
    return cover[y : y + height, x : x + width]


def _paint(rng: np.random.Generator, window: np.ndarray, cover: np.ndarray) -> None:
    """Blend a digit of one colour, slightly uneven, into ``window [h, w, 3]``; ``cover [h, w, 1]``."""
    below = float(((window * cover).sum(axis=(0, 1)) / cover.sum()) @ _LUMA)
    for _ in range(10):
        colour = rng.uniform(0, 1, 3).astype(np.float32)
        if abs(float(colour @ _LUMA) - below) >= _MIN_CONTRAST:
            break
    else:
        colour = np.full(3, 1.0 if below < 0.5 else 0.0, dtype=np.float32)
    uneven = colour + 0.06 * _noise(rng, 3, window.shape[:2])[..., None]
    window += cover * np.float32(rng.uniform(0.85, 1.0)) * (uneven - window)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A canvas ``[S, S, 3]`` float32: a colour gradient, noise of several octaves, and faint strokes."""
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    gradient = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
    base = rng.uniform(0.15, 0.85, 3).astype(np.float32)
    slope = rng.uniform(-0.25, 0.25, 3).astype(np.float32)
    canvas = base + gradient[..., None] * slope
    octaves = np.stack([_noise(rng, cells, (size, size)) for cells in (3, 6, 12, 24)], axis=-1)
    strength = rng.uniform(0.03, 0.12) * 0.7 ** np.arange(4)
    tints = rng.uniform(0.5, 1, (4, 3)) * strength[:, None]
    canvas += octaves @ tints.astype(np.float32)
    strokes = Image.new("L", (size, size))
    draw = ImageDraw.Draw(strokes)
    for _ in range(int(rng.integers(0, 5))):
        corners = rng.integers(-size // 4, size + size // 4, 4).tolist()
        width = int(rng.integers(1, max(2, size // 24) + 1))
        if rng.random() < 0.5:
            draw.line(corners, fill=255, width=width)
        else:
            box = [min(corners[0], corners[2]), min(corners[1], corners[3])]
            box += [max(corners[0], corners[2]), max(corners[1], corners[3])]
            begin, end = rng.uniform(0, 360, 2).tolist()
            draw.arc(box, begin, end, fill=255, width=width)
    shift = rng.uniform(-0.12, 0.12, 3).astype(np.float32)
    canvas += np.asarray(strokes, dtype=np.float32)[..., None] / 255 * shift
    return canvas


def _noise(rng: np.random.Generator, cells: int, shape: tuple[int, int]) -> np.ndarray:
    """Smooth noise, float32 ``[h, w]`` of mean 0 and size 1, with ``cells`` bumps along each side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
