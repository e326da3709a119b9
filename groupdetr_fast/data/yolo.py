"""Data sets in YOLO's layout, as COCO json.

A file ``data.yaml`` names the classes and the places of the images; beside each folder ``images`` lies a folder
``labels`` with a text file per image. A line is ``class cx cy width height`` or ``class x1 y1 x2 y2 x3 y3 ...``, a
polygon, normalised by the size of the image. The semantics are those of Ultralytics' loader.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .annotations import DataError
from .cache import cache_root, made_once
from .images import IMAGE_SUFFIXES, open_image, upright_size

__all__ = ["YoloPart", "has_images", "read_yolo", "yolo_as_coco"]

# Part of the cache folder's name: raise it whenever the same files give another json.
_VERSION = 2

Point = tuple[float, float]


@dataclass
class YoloPart:
    """The images of training, of evaluation or of the last test.

    Attributes:
        image_folder: that the file names in ``content`` are relative to.
        content: as in a COCO json; category ids are YOLO's class numbers.
        faults: a sentence for each image or label that was left out.
        labelled: whether any image has a label file; it is a fault if none has.
    """

    image_folder: Path
    content: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    labelled: bool = True


def yolo_as_coco(data_file: Path, part: str) -> tuple[Path, Path]:
    """The folder of the images and a COCO json of them, which is kept in the cache until a file changes.

    Args:
        data_file: the ``data.yaml``.
        part: "train", "val" or "test".

    Raises:
        DataError: for a fault in ``data.yaml`` or in a label, or an image that cannot be read.
    """
    images = _image_files(data_file, _read_yaml(data_file), part)
    stamps = [_stamp(path) for image in images for path in (image, _label_file(image))]
    identity = [_VERSION, str(data_file.resolve()), data_file.read_text(), part, stamps]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    folder = cache_root() / f"yolo-{digest}"

    def write(unfinished: Path) -> None:
        found = read_yolo(data_file, part)
        if found.faults:
            more = f" (and {len(found.faults) - 1} more: groupdetr check lists them)" if found.faults[1:] else ""
            raise DataError(found.faults[0] + more)
        (unfinished / f"{part}.json").write_text(json.dumps(found.content))

    made_once(folder, write)
    return _common_folder(images), folder / f"{part}.json"


def has_images(data_file: Path, part: str) -> bool:
    """Whether ``data.yaml`` names images of a part, and any of them is there.

    Raises:
        DataError: if the file cannot be read as yaml, or a list of images as text.
    """
    settings = _read_yaml(data_file)
    try:
        places = _places(data_file, settings, part)
    except DataError:
        return False
    return any(map(os.path.isfile, _files_at(places.values())))  # lists also name what was not downloaded


def read_yolo(data_file: Path, part: str) -> YoloPart:
    """Read the images' sizes and labels. What is wrong with them is told in ``faults``, and left out.

    Raises:
        DataError: for a fault in ``data.yaml``, or if there are no images.
    """
    settings = _read_yaml(data_file)
    names = _class_names(data_file, settings)
    files = _image_files(data_file, settings, part)
    categories = [{"id": number, "name": name} for number, name in names.items()]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    result = YoloPart(_common_folder(files), content)
    labels = [_label_file(path) for path in files]
    result.labelled = any(label.is_file() for label in labels)
    if not result.labelled:
        result.faults.append(
            f"{data_file}: no image of {part} has a label file; that of {files[0].name} is looked for at {labels[0]}"
        )
    for image_id, (path, label) in enumerate(zip(files, labels, strict=True), start=1):
        try:
            with open_image(path) as image:
                width, height = upright_size(image)
        except Exception as error:  # decoders raise anything on damaged files
            result.faults.append(f"image file {path} cannot be read ({error}); replace or remove it")
            continue
        name = path.relative_to(result.image_folder).as_posix()
        content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for category, points in _objects(label, names, result.faults):
            points = [(x * width, y * height) for x, y in points]
            entry = {"id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": category}
            content["annotations"].append(entry | _shape(points))
    return result


def _shape(points: list[Point]) -> dict[str, Any]:
    """The box around points in pixels, and the polygon if there are more than two."""
    xs, ys = zip(*points, strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    shape = {"bbox": [min(xs), min(ys), width, height], "area": width * height, "iscrowd": 0}
    if len(points) > 2:
        shape["segmentation"] = [[value for point in points for value in point]]
    return shape


def _objects(path: Path, names: dict[int, str], faults: list[str]) -> Iterator[tuple[int, list[Point]]]:
    """Class and normalised points, two corners or a polygon, of each object in a label file; none if there is none."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"label file {path} cannot be read ({error})")
        return
    numbered = {line: number for number, line in reversed(list(enumerate(lines, start=1)))}  # repeated lines count once
    for line, number in sorted(numbered.items(), key=lambda item: item[1]):
        if not line.strip():
            continue
        try:
            yield _parse(line.split(), names)
        except ValueError as error:
            faults.append(f"label file {path}, line {number}: {error}")


def _parse(words: list[str], names: dict[int, str]) -> tuple[int, list[Point]]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"expected numbers, got {' '.join(words)!r}")
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise ValueError(
            f"expected class cx cy width height, or a class and at least three points, got {len(values)} numbers"
        )
    category, *values = values
    if category not in names:
        raise ValueError(f"class {words[0]} is not among the {len(names)} names of data.yaml")
    if len(values) == 4:
        cx, cy, width, height = values
        return int(category), [(cx - width / 2, cy - height / 2), (cx + width / 2, cy + height / 2)]
    return int(category), list(zip(values[::2], values[1::2], strict=True))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except RecursionError:
        raise DataError(f"{path} cannot be read as yaml (it is nested too deeply)") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as yaml ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must have the keys train, val and names")
    return content


def _class_names(path: Path, settings: dict[str, Any]) -> dict[int, str]:
    names = settings.get("names", settings.get("nc"))
    if type(names) is int:
        names = list(range(names))
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(type(key) is int and key >= 0 for key in names):
        raise DataError(f"{path}: names must be a list of class names, or a table from class numbers to names")
    if not all(isinstance(name, str | int | float) for name in names.values()):  # a list may repeat itself without end
        raise DataError(f"{path}: names must be texts")
    return {number: str(names[number]) for number in sorted(names)}


def _image_files(data_file: Path, settings: dict[str, Any], part: str) -> list[Path]:
    """The images of a part, of which there is one at least, whether or not those of a list exist."""
    places = _places(data_file, settings, part)
    files = _files_at(places.values())
    if not files:
        raise DataError(f"{data_file}: there are no images in {', '.join(places)} ({part})")
    return sorted(files)


def _places(data_file: Path, settings: dict[str, Any], part: str) -> dict[str, Path]:
    """Where the images of a part are, by entry: a folder or a text file of paths, or several of those."""
    sources = settings.get(part)
    sources = sources if isinstance(sources, list) else [sources]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise DataError(f"{data_file} must say under {part} where the images are")
    return {source: _find(data_file, settings, source) for source in sources}


def _files_at(places: Iterable[Path]) -> set[Path]:
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            files += (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        else:
            try:
                lines = place.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{place} cannot be read as a list of images ({error})") from None
            files += (place.parent / line.strip() for line in lines if line.strip())
    return {Path(os.path.abspath(path)) for path in files}


def _find(data_file: Path, settings: dict[str, Any], source: str) -> Path:
    roots = [data_file.parent / str(settings.get("path") or ""), data_file.parent]
    # Some exports write paths as seen from one folder further down.
    for place in (root / name for name in (source, source.removeprefix("../")) for root in roots):
        if place.exists():
            return place
    raise DataError(f"{data_file}: there is nothing at {source}, as seen from {roots[0]}")


def _label_file(image: Path) -> Path:
    """``.../images/a/b.jpg`` -> ``.../labels/a/b.txt``; beside the image if there is no folder ``images``."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _common_folder(images: list[Path]) -> Path:
    return Path(os.path.commonpath([image.parent for image in images]))


def _stamp(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return [str(path)]
    return [str(path), status.st_mtime_ns, status.st_size]
