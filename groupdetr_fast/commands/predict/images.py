"""What ``groupdetr predict`` writes about images."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data import DataError
from ...data.annotations import is_inside
from ...data.images import as_rgb
from ...evaluation.visualize import (
    CELL_PIXELS,
    PICTURE_PIXELS,
    draw_detections,
    draw_image,
    reduce_image,
    scale_objects,
)
from ...files import read_json, write_whole
from ...prediction import InferenceSettings
from .coco import as_entries, categories
from .drawing import DrawingThread
from .sources import unlike_each_other

__all__ = ["JSON", "PICTURES", "SHEET", "ImageReader", "ImageResults", "ReadImage"]

logger = logging.getLogger(__name__)

JSON, SHEET, PICTURES = "predictions.json", "contact_sheet.png", "images"


@dataclass(frozen=True)
class ReadImage:
    """What is kept of an image that was read.

    Attributes:
        path: of the file.
        size: (height, width) in pixels.
        picture: ``[3, H, W]`` uint8, reduced to what is drawn; None if nothing is.
    """

    path: Path
    size: tuple[int, int]
    picture: Tensor | None


class ImageReader:
    """Reads images, in any thread.

    Args:
        picture_pixels: of the long side of what is kept of them, to be drawn; None to keep nothing.

    Attributes:
        unreadable: files that could not be read, which were logged.
    """

    def __init__(self, picture_pixels: int | None = PICTURE_PIXELS) -> None:
        self.picture_pixels = picture_pixels
        self.unreadable: list[Path] = []

    def __call__(self, path: Path) -> tuple[Tensor, ReadImage] | None:
        try:
            pixels = as_rgb(path)
        except DataError as error:
            logger.warning("%s", error)
            self.unreadable.append(path)
            return None
        picture = None if self.picture_pixels is None else reduce_image(pixels, self.picture_pixels)
        return pixels, ReadImage(path, _size(pixels), picture)

    def fault(self, paths: Sequence[Path]) -> str | None:
        """What to say of the files that could not be read; None if there are none."""
        if not self.unreadable:
            return None
        unreadable = set(self.unreadable)
        failed = [path for path in paths if path in unreadable]
        names = ", ".join(f"{path}{'' if path.exists() else ' (which does not exist)'}" for path in failed)
        rest = "; the others are done" if len(failed) < len(paths) else ""
        return f"{len(failed)} of {len(paths)} images cannot be read: {names}{rest}"


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[1:]
    return height, width


class ImageResults:
    """Writes the results of images, which come in any order.

    Args:
        output: the folder.
        paths: of all images, in the order in which results are written.
        settings: names of the classes.
        least: the lowest score of detections.
        contact_sheet: images that are shown together.
        annotated: whether to write each image with its detections.
    """

    def __init__(
        self,
        output: Path,
        paths: Sequence[Path],
        settings: InferenceSettings,
        *,
        least: float,
        contact_sheet: int,
        annotated: bool,
    ):
        self.output, self.settings, self.least = output, settings, least
        self.contact_sheet, self.annotated = contact_sheet, annotated
        self.names = [f"{stem}.jpg" for stem in unlike_each_other(path.stem for path in paths)]
        self.entries: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self.thumbnails: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self.drawing = DrawingThread()
        output.mkdir(parents=True, exist_ok=True)
        self._remove_earlier()

    def add(self, index: int, image: ReadImage, detection: dict[str, Any]) -> None:
        """Add the detections of the image with this number."""
        height, width = image.size
        entry: dict[str, Any] = {"file_name": str(image.path), "width": width, "height": height}
        self.entries[index] = (entry, as_entries(detection, self.settings))
        tensors = {name: value for name, value in detection.items() if name != "class_names"}
        if image.picture is not None and self.annotated:
            entry["picture"] = picture = f"{PICTURES}/{self.names[index]}"
            shown = scale_objects(tensors, image.size, _size(image.picture))
            names = self.settings.class_names
            self.drawing.add(draw_image, image.picture, shown, names, self.output / picture, self.least)
        # Only of what can be in the sheet: of many images most come too late.
        free = len(self.thumbnails) < self.contact_sheet
        if image.picture is not None and (free or (self.thumbnails and index < max(self.thumbnails))):
            thumbnail = reduce_image(image.picture, CELL_PIXELS)
            self.thumbnails[index] = (thumbnail, scale_objects(tensors, image.size, _size(thumbnail)))
            if len(self.thumbnails) > self.contact_sheet:
                del self.thumbnails[max(self.thumbnails)]

    def finish(self) -> None:
        """Write what is about all images, and say how many there are; also if a picture cannot be drawn."""
        try:
            self.drawing.finish()
        finally:
            self._write()

    def _write(self) -> None:
        content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        for image_id, index in enumerate(sorted(self.entries), start=1):
            image, annotations = self.entries[index]
            content["images"].append({"id": image_id, **image})
            for each in annotations:
                number = len(content["annotations"]) + 1
                content["annotations"].append({"id": number, "image_id": image_id, **each, "iscrowd": 0})
        content["categories"] = categories(self.settings, (entry["category_id"] for entry in content["annotations"]))
        write_whole(self.output / JSON, json.dumps(content) + "\n")
        if self.thumbnails:
            pictures, detections = zip(*(self.thumbnails[index] for index in sorted(self.thumbnails)), strict=True)
            names, sheet = self.settings.class_names, self.output / SHEET
            draw_detections(pictures, None, detections, names, sheet, self.least)
        images, annotated = len(content["images"]), len(content["annotations"])
        print(f"{annotated} detections in {images} images: {self.output}")

    def _remove_earlier(self) -> None:
        """Remove the pictures of an earlier prediction into the same folder, which its json lists."""
        earlier = read_json(self.output / JSON)
        images = earlier.get("images") if isinstance(earlier, dict) else None
        for entry in images if isinstance(images, list) else ():
            picture: Any = entry.get("picture") if isinstance(entry, dict) else None
            if is_inside(picture) and Path(picture).parent == Path(PICTURES):
                (self.output / picture).unlink(missing_ok=True)
        if isinstance(images, list):
            (self.output / SHEET).unlink(missing_ok=True)
