"""The ground truth of COCO's metric: checked, and with numbers of its own in place of ids."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..data.segmentations import parse_segmentation

__all__ = ["CocoLike", "GroundTruth", "IouType", "as_segmentation", "check_iou_type", "require_json"]

IouType = Literal["bbox", "segm"]


class CocoLike(Protocol):
    """What pycocotools' COCO, and others made after it, have of a file."""

    dataset: dict[str, Any]


@dataclass(frozen=True)
class GroundTruth:
    """Images, categories and objects, crowd regions among them.

    Ids may be any integers, 0 among them, which COCO's evaluation takes for "no match": here the ``n``-th smallest of
    them stands for each, counted from 1.

    Attributes:
        image_ids: ids of the images to evaluate, ascending.
        known_ids: ids of all images.
        sizes: (height, width) of each image to evaluate; of one without them, None.
        category_ids: ascending.
        category_names: of the same.
        images: ``[M]``, number of each object's image.
        categories: ``[M]``, number of each object's category.
        boxes: ``[M, 4]`` float64, xywh in pixels; zeros where masks are compared.
        areas: ``[M]`` float64.
        crowds: ``[M]`` of 0 and 1.
        segmentations: polygons or run lengths of each object; None where boxes are compared.
    """

    image_ids: list[int]
    known_ids: frozenset[int]
    sizes: list[tuple[int | None, int | None]]
    category_ids: list[int]
    category_names: list[str]
    images: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    segmentations: list[Any] | None

    @classmethod
    def of(
        cls,
        source: "CocoLike | Mapping[str, Any] | str | Path",
        iou_type: IouType,
        image_ids: Iterable[int] | None = None,
    ) -> "GroundTruth":
        """Read and check.

        Args:
            source: see :class:`~groupdetr_fast.evaluation.CocoEvaluator`.
            iou_type: "bbox" or "segm".
            image_ids: of the images to evaluate; None for all.

        Raises:
            ValueError: for what cannot be used; one sentence.
        """
        check_iou_type(iou_type)
        content = _content(source)
        images = {image["id"]: image for image in content["images"]}
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        evaluated = sorted(images if image_ids is None else set(image_ids))
        if not evaluated:
            raise ValueError("there is no image to evaluate")
        missing = next((number for number in evaluated if number not in images), None)
        if missing is not None:
            raise ValueError(f"image_ids: image {missing} is not in the ground truth")
        category_ids = sorted(categories)
        image_numbers = {image_id: number for number, image_id in enumerate(evaluated, start=1)}
        category_numbers = {category_id: number for number, category_id in enumerate(category_ids, start=1)}

        kept, segmentations = _usable(content["annotations"], images, category_numbers, iou_type)
        used = [index for index, annotation in enumerate(kept) if annotation["image_id"] in image_numbers]
        objects = [kept[index] for index in used]
        boxes = np.zeros((len(objects), 4))
        if iou_type == "bbox" and objects:
            boxes = np.array([_box(annotation) for annotation in objects])
        return cls(
            image_ids=evaluated,
            known_ids=frozenset(images),
            sizes=[(images[number].get("height"), images[number].get("width")) for number in evaluated],
            category_ids=category_ids,
            category_names=[categories[number] for number in category_ids],
            images=_numbers(image_numbers[annotation["image_id"]] for annotation in objects),
            categories=_numbers(category_numbers[annotation["category_id"]] for annotation in objects),
            boxes=boxes,
            areas=np.array([_area(annotation) for annotation in objects], dtype=np.float64),
            crowds=_numbers(int(annotation.get("iscrowd", 0)) for annotation in objects),
            segmentations=[segmentations[index] for index in used] if iou_type == "segm" else None,
        )

    def objects_of(self, number: int) -> np.ndarray:
        """Places of the objects of the image with this number, among all ``M``."""
        order, bounds = self._by_image
        return order[bounds[number - 1] : bounds[number]]

    @functools.cached_property
    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.images, kind="stable")
        return order, np.searchsorted(self.images[order], np.arange(1, len(self.image_ids) + 2))

    def distinct_names(self) -> list[str]:
        """Names of the categories, with their ids behind names that several of them have."""
        names = self.category_names
        return [
            name if names.count(name) == 1 else f"{name} ({category_id})"
            for category_id, name in zip(self.category_ids, names, strict=True)
        ]


def check_iou_type(iou_type: str) -> None:
    """Raises ValueError for anything but an :data:`IouType`."""
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f'iou_type must be "bbox" or "segm", got {iou_type!r}')


def as_segmentation(entry: Mapping[str, Any], image: Mapping[str, Any], who: str) -> Any:
    """The checked segmentation of an annotation or a detection, as the metric takes it; None if it has none.

    Raises:
        ValueError: for one that cannot be understood, or that would make the metric run on for ever.
    """
    height: Any = image.get("height")
    width: Any = image.get("width")  # what is missing fits no segmentation
    try:
        parsed = parse_segmentation(entry.get("segmentation", []), height, width)
    except ValueError as error:
        raise ValueError(f"{who}: the segmentation {error}") from None
    if not isinstance(parsed, list):
        return parsed
    if type(height) is not int or type(width) is not int:
        raise ValueError(f"{who}: polygons need the height and width of their image, which the ground truth lacks")
    return [polygon.tolist() for polygon in parsed]


def require_json(path: str | Path, kind: str) -> Any:
    """The content of a json file that must be there.

    Raises:
        ValueError: if it cannot be read, or is no json.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{kind} file {path} cannot be read ({error.strerror}); give a readable json file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind} file {path} is not valid json ({error})") from None


def _content(source: "CocoLike | Mapping[str, Any] | str | Path") -> Mapping[str, Any]:
    content: Any = source
    if isinstance(source, (str, Path)):
        content = require_json(source, "annotation")
    elif not isinstance(source, Mapping):
        content = source.dataset
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f'the ground truth lacks the key "{key}"')
    return content


def _usable(
    annotations: Iterable[dict[str, Any]], images: Mapping[int, Any], categories: Mapping[int, Any], iou_type: IouType
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The annotations that can be compared, of whatever image, and their segmentations where those are compared.

    Those of images that are not evaluated are checked too: a mask of any could make a later evaluation run for ever.
    """
    kept, segmentations = [], []
    for annotation in annotations:
        image = images.get(annotation["image_id"])
        if image is None or annotation["category_id"] not in categories:
            continue
        if iou_type == "segm":
            segmentation = as_segmentation(annotation, image, f"annotation {annotation['id']}")
            if segmentation is None:
                continue
            segmentations.append(segmentation)
        kept.append(annotation)
    return kept, segmentations


def _box(annotation: Mapping[str, Any]) -> Sequence[float]:
    box = annotation.get("bbox")
    if box is None:
        raise ValueError(f"annotation {annotation['id']} has no bbox: evaluate masks, or add it")
    return [float(number) for number in box]


def _area(annotation: Mapping[str, Any]) -> float:
    if "area" in annotation:
        return float(annotation["area"])
    if "bbox" not in annotation:
        raise ValueError(f"annotation {annotation['id']} has neither an area nor a bbox: add one of them")
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _numbers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)
