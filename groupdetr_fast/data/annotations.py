"""Reading and checking a COCO annotation file."""

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from .segmentations import Segmentation, Segmentations, parse_segmentation
from .texts import Texts

__all__ = [
    "MEDIUM",
    "SMALL",
    "WITHOUT_MASK",
    "Annotations",
    "DataError",
    "is_box",
    "is_inside",
    "read_annotations",
    "read_coco",
]

SMALL, MEDIUM = 32**2, 96**2  # pixels, the limits of COCO's small and medium objects
WITHOUT_MASK = "objects without a usable segmentation"  # in the warning of those that were dropped for it
_TABLES = ("images", "annotations", "categories")
_IDS_IN_WARNING = 5
_LARGEST_ID = 2**63 - 1
_LARGEST_SIDE = 2**31 - 1  # pixels


class DataError(ValueError):
    """A fault in the data, told in one sentence that names the file or the id and says what to do."""

    def __init__(self, message: str):
        # A DataLoader re-raises a worker's error with the worker's traceback as its message; our sentence ends it.
        super().__init__(message.rpartition("DataError: ")[2].strip())


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file, without crowd regions and degenerate boxes, packed image by image.

    Attributes:
        path: the file.
        image_ids: ``[N]`` int64, ids of the images in the order of the file.
        file_names: relative to the image folder.
        image_sizes: ``[N, 2]`` int64, (height, width) of each image in pixels, as the file states them.
        categories: the file's category entries, ascending by id.
        boxes: ``[M, 4]`` float32, ``xyxy`` in pixels, clipped to the image; those of image ``i`` are the rows
            ``offsets[i]:offsets[i + 1]``.
        category_ids: ``[M]`` int64.
        offsets: ``[N + 1]`` int64.
        segmentations: of the same ``M`` objects, or None.
        warnings: sentences about what was dropped.
    """

    path: Path
    image_ids: np.ndarray
    file_names: Texts
    image_sizes: np.ndarray
    categories: list[dict[str, Any]]
    boxes: Tensor
    category_ids: Tensor
    offsets: np.ndarray
    segmentations: Segmentations | None = None
    warnings: tuple[str, ...] = ()

    @property
    def counts(self) -> Tensor:
        """``[N]`` int64, objects of each image."""
        return torch.from_numpy(self.offsets).diff()


def read_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO annotation file whose three tables are known to be lists of objects.

    Raises:
        DataError: if the file is missing, is not json, or lacks "images", "annotations" or "categories".
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"annotation file {path} does not exist; give the path of a COCO json file") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read ({error.strerror}); give a readable file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {path} is not valid json ({error}); export or download it again") from None
    if not isinstance(content, dict):
        raise DataError(f"annotation file {path} must hold a json object with the keys {', '.join(_TABLES)}")
    for table in _TABLES:
        if table not in content:
            raise DataError(f'annotation file {path} lacks the key "{table}"; a COCO file has {", ".join(_TABLES)}')
        if not isinstance(content[table], list) or not all(isinstance(entry, dict) for entry in content[table]):
            raise DataError(f'annotation file {path}: "{table}" must be a list of objects')
    return content


def read_annotations(path: str | Path, *, segmentations: bool = False) -> Annotations:
    """Read and check a COCO annotation file.

    Crowd regions are left out. Boxes are clipped to their image; boxes of zero, negative or non-finite size and boxes
    entirely outside their image are dropped, which the warnings say; with ``segmentations``, objects without one as
    well.

    Raises:
        DataError: for a missing or unreadable file, a missing key, a duplicate id, a value of the wrong type, an
            unsafe file name, or an annotation whose image or category is not in the tables; with ``segmentations``,
            for one that cannot be understood, or if there is none at all.
    """
    path = Path(path)
    content = read_coco(path)
    _check_not_empty(path, content)
    images = _entries(path, "images", content["images"], ("file_name", "width", "height"))
    categories = _entries(path, "categories", content["categories"], ("name",))
    annotations = _entries(path, "annotations", content["annotations"], ("image_id", "category_id", "bbox"))
    _check_names(path, categories)
    names = Texts.pack([_file_name(path, image) for image in images.values()])
    image_sizes = np.array([_image_size(path, image) for image in images.values()], dtype=np.int64)

    kept, boxes = _objects(path, annotations.values(), images, categories)
    position = {image_id: index for index, image_id in enumerate(images)}
    owners = np.array([position[each["image_id"]] for each in kept], dtype=np.int64)
    category_ids = torch.tensor([each["category_id"] for each in kept], dtype=torch.int64)
    boxes, valid = _clip(boxes, image_sizes[owners])
    warnings = [_dropped(kept, ~valid, "boxes that are empty, not finite or outside their image")]
    parsed: list[Segmentation | None] = [None] * len(kept)
    if segmentations:
        parsed = [_segmentation(path, annotation, images) for annotation in kept]
        usable = np.array([mask is not None for mask in parsed], dtype=bool)
        if kept and not usable.any():
            raise DataError(f"annotation file {path} has no segmentations; give a file with polygons or run lengths")
        warnings.append(_dropped(kept, valid & ~usable, WITHOUT_MASK))
        valid &= usable
    order = np.argsort(owners, kind="stable")
    order = order[valid[order]]
    counts = np.bincount(owners[order], minlength=len(images))
    usable_ones = [segmentation for index in order if (segmentation := parsed[index]) is not None]
    return Annotations(
        path=path,
        image_ids=np.array(list(images), dtype=np.int64),
        file_names=names,
        image_sizes=image_sizes,
        categories=[categories[category_id] for category_id in sorted(categories)],
        boxes=torch.from_numpy(boxes[order]),
        category_ids=category_ids[order],
        offsets=np.concatenate(([0], np.cumsum(counts))),
        segmentations=Segmentations.pack(usable_ones) if segmentations else None,
        warnings=tuple(filter(None, warnings)),
    )


def _objects(
    path: Path, annotations: Collection[dict[str, Any]], images: Mapping[int, Any], categories: Mapping[int, Any]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The annotations without crowd regions, all of them checked, and their boxes ``[M, 4]`` xywh."""
    kept: list[dict[str, Any]] = []
    boxes = np.empty((len(annotations), 4))
    for annotation in annotations:
        _check_reference(path, annotation, "image_id", images, "images")
        _check_reference(path, annotation, "category_id", categories, "categories")
        box = _box(path, annotation)
        if not _is_crowd(path, annotation):
            boxes[len(kept)] = box
            kept.append(annotation)
    return kept, boxes[: len(kept)]


def _check_not_empty(path: Path, content: Mapping[str, Any]) -> None:
    for table in ("images", "categories"):
        if not content[table]:
            raise DataError(f'annotation file {path}: "{table}" is empty; give a file with at least one entry')


def _check_names(path: Path, categories: dict[int, dict[str, Any]]) -> None:
    for category in categories.values():
        if not (isinstance(category["name"], str) and _is_text(category["name"])):
            raise DataError(
                f"annotation file {path}: category {category['id']} has the name {category['name']!r}; it must be text"
            )


def _dropped(annotations: Sequence[dict[str, Any]], dropped: np.ndarray, what: str) -> str:
    """A sentence about dropped annotations; empty if there are none."""
    if not dropped.any():
        return ""
    ids = [annotations[index]["id"] for index in np.flatnonzero(dropped).tolist()]
    shown = ", ".join(map(str, ids[:_IDS_IN_WARNING])) + (", ..." if len(ids) > _IDS_IN_WARNING else "")
    return f"dropped {len(ids)} of {len(annotations)} {what} (annotation ids {shown})"


def _entries(
    path: Path, table: str, entries: Sequence[dict[str, Any]], keys: tuple[str, ...]
) -> dict[int, dict[str, Any]]:
    """The entries of one table by their ids."""
    by_id: dict[int, dict[str, Any]] = {}
    keys = ("id", *keys)
    for index, entry in enumerate(entries):
        for key in keys:
            if key not in entry:
                raise DataError(f'annotation file {path}: {table}[{index}] lacks the key "{key}"; add it')
        entry_id = entry["id"]
        if type(entry_id) is not int:
            raise _not_an_integer(path, f"{table}[{index}]", "id", entry_id)
        if abs(entry_id) > _LARGEST_ID:
            raise DataError(
                f"annotation file {path}: {table}[{index}] has an id beyond 64 bits; number the entries anew"
            )
        if entry_id in by_id:
            raise DataError(f'annotation file {path}: id {entry_id} occurs twice in "{table}"; make its ids unique')
        by_id[entry_id] = entry
    return by_id


def _not_an_integer(path: Path, owner: str, key: str, value: Any) -> DataError:
    return DataError(f'annotation file {path}: {owner}: "{key}" must be an integer, got {value!r}')


def _check_reference(
    path: Path, annotation: dict[str, Any], key: str, table: Mapping[int, dict[str, Any]], name: str
) -> None:
    value = annotation[key]
    if type(value) is not int:
        raise _not_an_integer(path, f"annotation {annotation['id']}", key, value)
    if value not in table:
        raise DataError(
            f'annotation file {path}: annotation {annotation["id"]} has {key} {value}, which is not in "{name}"; '
            "add the entry or remove the annotation"
        )


def _file_name(path: Path, image: dict[str, Any]) -> str:
    name = image["file_name"]
    if not is_inside(name):
        raise DataError(
            f"annotation file {path}: image {image['id']} has the file name {name!r}; "
            "it must be a path inside the image folder"
        )
    return name


def is_inside(name: Any) -> TypeGuard[str]:
    """Whether a value is the name of a file that lies in the folder which it is relative to."""
    # The Windows flavour knows both separators and drives, so that one check serves every system.
    parsed = PureWindowsPath(name) if isinstance(name, str) else None
    if not parsed or not _is_text(name):
        return False
    return bool(parsed.parts) and not (parsed.drive or parsed.root or ".." in parsed.parts)


def _is_text(name: str) -> bool:
    """Whether a file can have the name: json may hold half a surrogate pair, which no encoding has."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def _image_size(path: Path, image: dict[str, Any]) -> tuple[int, int]:
    height, width = image["height"], image["width"]
    for key, value in (("height", height), ("width", width)):
        if type(value) is not int:
            raise _not_an_integer(path, f"image {image['id']}", key, value)
    if not (1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE):
        raise DataError(
            f"annotation file {path}: image {image['id']} has the size {width} x {height}; "
            "write the image's width and height in pixels"
        )
    return height, width


def _box(path: Path, annotation: dict[str, Any]) -> tuple[float, float, float, float]:
    box = annotation["bbox"]
    if not is_box(box):
        raise DataError(
            f"annotation file {path}: annotation {annotation['id']} has the bbox {reprlib.repr(box)}; "
            "it must be four numbers, x, y, width, height in pixels"
        )
    x, y, width, height = map(float, box)
    return x, y, width, height


def is_box(value: Any) -> bool:
    """Whether a value is a list of four numbers, as COCO's "bbox"; they may be infinite or not be numbers at all."""
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    """Whether json's value is a number that a float can hold: its integers have any length."""
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST_ID)


def _is_crowd(path: Path, annotation: dict[str, Any]) -> bool:
    """Check what COCO's metric reads besides the box, "iscrowd" and "area"; both may be missing."""
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area", 0)
    if type(crowd) not in (int, bool) or crowd not in (0, 1):
        raise DataError(
            f"annotation file {path}: annotation {annotation['id']} has iscrowd {crowd!r}; it must be 0 or 1"
        )
    if not _is_number(area):
        raise DataError(
            f"annotation file {path}: annotation {annotation['id']} has the area {reprlib.repr(area)}; "
            "it must be a number"
        )
    return bool(crowd)


def _segmentation(path: Path, annotation: dict[str, Any], images: Mapping[int, dict[str, Any]]) -> Segmentation | None:
    image = images[annotation["image_id"]]
    try:
        return parse_segmentation(annotation.get("segmentation", []), image["height"], image["width"])
    except ValueError as error:
        raise DataError(f"annotation file {path}: annotation {annotation['id']}: the segmentation {error}") from None


def _clip(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[M, 4]`` xywh and image sizes ``[M, 2]`` (h, w) -> clipped xyxy float32, and which of them are valid."""
    finite = np.isfinite(boxes).all(axis=1)
    boxes = np.where(finite[:, None], boxes, 0.0)
    limits = sizes.reshape(-1, 2)[:, ::-1]
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    clipped = np.clip(corners, 0.0, np.concatenate((limits, limits), axis=1)).astype(np.float32)
    return clipped, finite & (boxes[:, 2:] > 0).all(axis=1) & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
