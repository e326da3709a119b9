"""The command ``groupdetr predict``."""

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from ..data import DataError
from ..data.annotations import is_inside
from ..data.annotations import read_json as read_coco
from ..data.images import IMAGE_SUFFIXES, as_rgb
from ..evaluation.coco import to_coco_results
from ..evaluation.visualize import (
    CELL_PIXELS,
    PICTURE_PIXELS,
    draw_detections,
    draw_image,
    reduce_image,
    scale_objects,
)
from ..files import read_json, write_whole
from ..models.postprocess import check_selection
from ..prediction import InferenceSettings, load_model, predict, settings_of
from .flags import CheckpointArgument, DetectorFlags, named

__all__ = ["PredictCommand", "find_images"]

logger = logging.getLogger(__name__)

MOST_THUMBNAILS = 200  # beyond which a picture is too large to look at
JSON, SHEET, PICTURES = "predictions.json", "contact_sheet.png", "images"


@dataclass(frozen=True, kw_only=True)
class PredictCommand(DetectorFlags):
    """Detect objects in images.

    Writes ``predictions.json`` (a COCO file: images, categories, and detections with scores as annotations), each image
    with its detections into ``images/``, and the first of them together into ``contact_sheet.png``. Images that cannot
    be read are named, and the others done.

    Attributes:
        checkpoint: file or folder of this package, such as that of a run, of an original repository or transformers;
            or transformers:DIR_OR_ID, for a model of transformers in a directory or on the hub.
        images: files, folders (the images directly in them) and patterns such as "photos/**/*.jpg".
        output: folder to write into.
        categories: COCO json whose categories name the classes, for checkpoints that do not.
        labels: with categories: what the class numbers of the checkpoint are, see docs/training.md.
        score_threshold: detections with lower scores are left out.
        top_k: detections per image.
        batch_size: images at a time.
        square: whether images become squares of that side, whatever their aspect ratio; None for the checkpoint's own.
        eval_short_side: short side to which images are resized, in pixels; None for that of the checkpoint.
        eval_max_size: limit on the long side, which takes precedence; None for the checkpoint's.
        image_mean: of red, green, blue in [0, 1]; None for that of the checkpoint.
        image_std: standard deviation of the same.
        device: such as cpu or cuda:1; None for a GPU if there is one.
        contact_sheet: images in ``contact_sheet.png``, at most 200; 0 for none.
        annotated: whether to write each image with its detections.
    """

    checkpoint: CheckpointArgument = None
    images: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGES")]] = ()
    output: Path = Path("runs/predict")
    categories: Path | None = None
    labels: Literal["contiguous", "category_id"] = "category_id"
    score_threshold: float = 0.3
    top_k: int = 100
    batch_size: int = 4
    square: bool | None = None
    eval_short_side: int | None = None
    eval_max_size: int | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    device: str | None = None
    contact_sheet: int = 24
    annotated: bool = True

    def __call__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.contact_sheet <= MOST_THUMBNAILS:
            raise ValueError(f"contact_sheet must be 0 to {MOST_THUMBNAILS}, got {self.contact_sheet}")
        check_selection(self.top_k, self.score_threshold)
        checkpoint = named(self.checkpoint, "groupdetr predict CHECKPOINT IMAGES")
        paths = find_images(self.images, besides=self.output)
        if not any(path.exists() for path in paths):
            raise DataError(f"there is nothing at {', '.join(map(str, paths))}")
        model = load_model(checkpoint, device=self.device, **self.detector_settings())
        settings = self._settings(settings_of(model))
        writer = _Writer(self, settings)
        unreadable: list[Path] = []
        for start in range(0, len(paths), self.batch_size):
            images: list[_Image] = []
            detections = predict(
                model,
                _read(paths[start : start + self.batch_size], images, unreadable),
                score_threshold=self.score_threshold,
                top_k=self.top_k,
                batch_size=self.batch_size,
                settings=settings,
            )
            assert isinstance(detections, list)  # as those of several images are
            for image, detection in zip(images, detections, strict=True):
                writer.add(image, detection)
        writer.finish()
        if unreadable:
            names = ", ".join(f"{path}{'' if path.exists() else ' (which does not exist)'}" for path in unreadable)
            rest = "; the others are done" if len(unreadable) < len(paths) else ""
            raise DataError(f"{len(unreadable)} of {len(paths)} images cannot be read: {names}{rest}")

    def _settings(self, settings: InferenceSettings) -> InferenceSettings:
        if self.categories is not None:
            try:
                categories = sorted(read_coco(self.categories)["categories"], key=lambda category: category["id"])
                settings = settings.with_categories(categories, self.labels)
            except KeyError as error:
                raise DataError(f"annotation file {self.categories} has a category without the key {error}") from None
        return settings.with_sizes(
            square=self.square,
            eval_short_side=self.eval_short_side,
            eval_max_size=self.eval_max_size,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )


def find_images(names: Sequence[str], *, besides: Path | None = None) -> list[Path]:
    """The image files that are meant.

    Args:
        names: files; folders, of which the image files directly in them are meant; patterns of ``glob``, where ``**``
            goes through folders.
        besides: a folder whose content folders and patterns leave out, as that of earlier results.

    Returns:
        Paths without repetition, in the order of ``names``. A file that is named need not exist.

    Raises:
        DataError: if a folder or a pattern has no images, or nothing is named.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            candidates = sorted(path.iterdir())
        elif not path.exists() and glob.has_magic(name):
            candidates = sorted(map(Path, glob.glob(name, recursive=True)))
        else:
            found[path] = None
            continue
        inside = {
            path: None
            for path in candidates
            if path.suffix.lower() in IMAGE_SUFFIXES and (besides is None or besides not in path.parents)
        }
        if not inside:
            raise DataError(f"there are no images in {name}")
        found |= inside
    if not found:
        raise DataError("name the images: files, folders or patterns")
    return list(found)


@dataclass(frozen=True)
class _Image:
    path: Path
    size: tuple[int, int]  # (height, width)
    picture: Tensor  # reduced to what is drawn


def _read(paths: Sequence[Path], images: list[_Image], unreadable: list[Path]) -> Iterator[Tensor]:
    """The pixels of images, which are also added to ``images``.

    Files that cannot be read are logged and added to ``unreadable``.
    """
    for path in paths:
        try:
            pixels = as_rgb(path)
        except DataError as error:
            logger.warning("%s", error)
            unreadable.append(path)
            continue
        images.append(_Image(path, _size(pixels), reduce_image(pixels, PICTURE_PIXELS)))
        yield pixels
        del pixels  # before the next image is read


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[1:]
    return height, width


class _Writer:
    """Writes the results of images, one after another."""

    def __init__(self, command: PredictCommand, settings: InferenceSettings):
        self.command = command
        self.settings = settings
        self.content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        self.thumbnails: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.file_names: set[str] = set()
        command.output.mkdir(parents=True, exist_ok=True)
        self._remove_earlier()

    def add(self, image: _Image, detection: dict[str, Any]) -> None:
        detection = {name: value for name, value in detection.items() if name != "class_names"}
        image_id = len(self.content["images"]) + 1
        height, width = image.size
        entry: dict[str, Any] = {"id": image_id, "file_name": str(image.path), "width": width, "height": height}
        self.content["images"].append(entry)
        results = to_coco_results([image_id], [detection], self.settings.category_ids)
        for index, result in enumerate(results):
            area = result["bbox"][2] * result["bbox"][3]
            if "masks" in detection:
                area = float(detection["masks"][index].sum())
            number = len(self.content["annotations"]) + 1
            self.content["annotations"].append({"id": number, **result, "area": area, "iscrowd": 0})
        if self.command.annotated:
            entry["picture"] = picture = f"{PICTURES}/{self._file_name(image.path)}"
            target = self.command.output / picture
            shown = scale_objects(detection, image.size, _size(image.picture))
            draw_image(image.picture, shown, self.settings.class_names, target, self.command.score_threshold)
        if len(self.thumbnails) < self.command.contact_sheet:
            thumbnail = reduce_image(image.picture, CELL_PIXELS)
            self.thumbnails.append((thumbnail, scale_objects(detection, image.size, _size(thumbnail))))

    def finish(self) -> None:
        self.content["categories"] = self._categories()
        write_whole(self.command.output / JSON, json.dumps(self.content) + "\n")
        if self.thumbnails:
            pictures, detections = zip(*self.thumbnails, strict=True)
            names, sheet = self.settings.class_names, self.command.output / SHEET
            draw_detections(pictures, None, detections, names, sheet, self.command.score_threshold)
        images, annotations = len(self.content["images"]), len(self.content["annotations"])
        print(f"{annotations} detections in {images} images: {self.command.output}")

    def _remove_earlier(self) -> None:
        """Remove the pictures of an earlier prediction into the same folder, which its json lists."""
        earlier = read_json(self.command.output / JSON)
        images = earlier.get("images") if isinstance(earlier, dict) else None
        for entry in images if isinstance(images, list) else ():
            picture: Any = entry.get("picture") if isinstance(entry, dict) else None
            if is_inside(picture) and Path(picture).parent == Path(PICTURES):
                (self.command.output / picture).unlink(missing_ok=True)
        if isinstance(images, list):
            (self.command.output / SHEET).unlink(missing_ok=True)

    def _categories(self) -> list[dict[str, Any]]:
        """Those that the checkpoint names, and those of the detections."""
        named = dict(zip(self.settings.category_ids or (), self.settings.class_names, strict=True))
        detected = {entry["category_id"] for entry in self.content["annotations"]}
        ids = sorted(detected | {category_id for category_id, name in named.items() if name != str(category_id)})
        return [{"id": category_id, "name": named.get(category_id, str(category_id))} for category_id in ids]

    def _file_name(self, path: Path) -> str:
        """The name of the picture of an image; images of several folders may have the same name."""
        name, number = f"{path.stem}.jpg", 1
        while name in self.file_names:
            number += 1
            name = f"{path.stem}_{number}.jpg"
        self.file_names.add(name)
        return name
