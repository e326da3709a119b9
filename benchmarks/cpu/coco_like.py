"""Data of COCO's size that may be made anywhere: annotations of train2017's and val2017's shape, and a few photographs.

The objects are made up: convex-looking outlines as polygons, and crowd regions as run lengths, at random places. Their
numbers, their sizes in pixels and in bytes of json are COCO's, so that reading and evaluating them costs as much.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from groupdetr_fast.data.cache import made_once

__all__ = ["CATEGORY_IDS", "TRAIN", "VAL", "Shape", "coco_like"]

HEIGHT, WIDTH = 480, 640
PHOTOGRAPHS = 64
OUTLINES = 4093  # shapes of objects
QUALITY = 95  # of jpegs, which gives about the 160 kB of COCO's images
SEED = 0

# COCO's: 1 to 90 without these ten.
CATEGORY_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@dataclass(frozen=True)
class Shape:
    """Numbers of an annotation file.

    Attributes:
        name: of the part.
        images: of the file.
        objects: of all images, crowd regions among them.
        crowds: regions of many objects.
        empty: images without objects.
    """

    name: str
    images: int
    objects: int
    crowds: int
    empty: int

    def reduced(self, factor: int) -> "Shape":
        """The same with the ``factor``-th part of everything."""
        return Shape(self.name, *(-(-n // factor) for n in (self.images, self.objects, self.crowds, self.empty)))


TRAIN = Shape("train", 118_287, 860_001, 10_052, 1_021)
VAL = Shape("val", 5_000, 36_781, 446, 48)


def coco_like(folder: Path, photographs: Path | None = None, reduce: int = 1) -> Path:
    """Make the data in a folder unless they are there.

    Args:
        folder: for data of all sizes.
        photographs: folder of jpegs to use; by default pictures are generated that have a photograph's spectrum.
        reduce: make the ``reduce``-th part only.

    Returns:
        The data set, in a layout that ``--data-path`` reads.
    """
    origin = "generated" if photographs is None else photographs.resolve().name
    made = folder / f"coco_like-{origin}-{reduce}"

    def make(empty: Path) -> None:
        (empty / "annotations").mkdir()
        (empty / "images").mkdir()
        for index, picture in enumerate(_pictures(photographs)):
            picture.save(empty / "images" / _file_name(index), quality=QUALITY)
        for shape in (TRAIN, VAL):
            _write(empty / "annotations" / f"instances_{shape.name}2017.json", shape.reduced(reduce))

    made_once(made, make)
    return made


def _file_name(index: int) -> str:
    return f"{index % PHOTOGRAPHS:012d}.jpg"


def _pictures(photographs: Path | None) -> list[Image.Image]:
    if photographs is None:
        rng = np.random.default_rng(SEED)
        return [_picture(rng) for _ in range(PHOTOGRAPHS)]
    paths = sorted(photographs.glob("*.jpg"))
    if not paths:
        raise ValueError(f"folder {photographs} has no *.jpg; give a folder of photographs")
    chosen = [paths[index % len(paths)] for index in range(PHOTOGRAPHS)]
    return [Image.open(path).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for path in chosen]


def _picture(rng: np.random.Generator) -> Image.Image:
    """Amplitudes that fall with the frequency, as in photographs, and channels that are alike."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    amplitudes = 1 / np.maximum(np.hypot(rows, columns), 1 / WIDTH) ** 1.4
    noise = rng.standard_normal((4, HEIGHT, WIDTH))
    layers = np.fft.irfft2(np.fft.rfft2(noise) * amplitudes, s=(HEIGHT, WIDTH))
    channels = 3 * layers[:1] + layers[1:]
    channels = 118 + 58 * (channels - channels.mean()) / channels.std()
    return Image.fromarray(channels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def _write(path: Path, shape: Shape) -> None:
    """Write an annotation file image by image: as one object it would take gigabytes."""
    rng = np.random.default_rng([SEED, shape.images])
    owners = _owners(shape, rng)
    crowds = np.zeros(shape.objects, dtype=bool)
    crowds[rng.choice(shape.objects, shape.crowds, replace=False)] = True
    categories = rng.choice(CATEGORY_IDS, shape.objects, p=_frequencies())
    # Sides between a few pixels and the image: about two fifths of the objects small, a quarter large, as in COCO.
    logarithms = rng.normal(np.log(50), 1.14, (shape.objects, 1)) + rng.normal(0, 0.35, (shape.objects, 2))
    sides = np.exp(logarithms).clip(4, (WIDTH - 1, HEIGHT - 1))
    corners = rng.random((shape.objects, 2)) * ((WIDTH, HEIGHT) - sides)
    outlines = [_outline(int(points), rng) for points in rng.geometric(1 / 19, OUTLINES).clip(max=120) + 3]
    with path.open("w") as file:
        file.write('{"info": {"description": "made up, of the size of COCO 2017"}, "licenses": [], "images": [')
        for index in range(shape.images):
            image = {
                "license": 1, "file_name": _file_name(index), "coco_url": f"http://localhost/{_file_name(index)}",
                "height": HEIGHT, "width": WIDTH, "date_captured": "2013-11-14 11:18:45", "id": index + 1,
            }  # fmt: skip
            file.write(f"{', ' if index else ''}{json.dumps(image)}")
        file.write('], "annotations": [')
        for index in range(shape.objects):
            x, y, width, height = *corners[index].round(2).tolist(), *sides[index].round(2).tolist()
            polygon = (corners[index] + sides[index] * outlines[index % OUTLINES]).round(2)
            annotation = {
                "segmentation": [polygon.ravel().tolist()],
                "area": round(0.7 * width * height, 4), "iscrowd": 0, "image_id": int(owners[index]) + 1,
                "bbox": [x, y, width, height], "category_id": int(categories[index]), "id": index + 1,
            }  # fmt: skip
            if crowds[index]:
                annotation |= {"segmentation": _columns(x, y, width, height), "iscrowd": 1}
            file.write(f"{', ' if index else ''}{json.dumps(annotation)}")
        names = [{"supercategory": "thing", "id": number, "name": f"category {number}"} for number in CATEGORY_IDS]
        file.write(f'], "categories": {json.dumps(names)}}}')


def _owners(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """The image of each object: one for each image that has any, and the rest where there are many already."""
    used = rng.permutation(shape.images)[: shape.images - shape.empty]
    weights = rng.exponential(size=len(used))
    rest = rng.choice(used, shape.objects - len(used), p=weights / weights.sum())
    return rng.permutation(np.concatenate((used, rest)))


def _frequencies() -> np.ndarray:
    """Of the categories: one has a third of all objects."""
    weights = 1 / np.arange(1, len(CATEGORY_IDS) + 1) ** 0.8
    weights[0] = weights[1:].sum() / 2
    return weights / weights.sum()


def _outline(points: int, rng: np.random.Generator) -> np.ndarray:
    """A polygon ``[points, 2]`` in a square of side 1."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radii = 0.5 * (0.8 + 0.2 * rng.random(points))
    return 0.5 + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)


def _columns(x: float, y: float, width: float, height: float) -> dict:
    """Run lengths of every other column of a box, as ragged as crowd regions are."""
    left, top, columns, rows = int(x), int(y), max(1, int(width) // 2), max(1, int(height))
    counts, position = [], 0
    for column in range(columns):
        start = (left + 2 * column) * HEIGHT + top
        counts += [start - position, rows]
        position = start + rows
    return {"counts": [*counts, HEIGHT * WIDTH - position], "size": [HEIGHT, WIDTH]}
