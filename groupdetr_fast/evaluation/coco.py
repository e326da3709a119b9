"""The COCO metric, by hotcoco, whose numbers are those of pycocotools."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from torch import Tensor, as_tensor

from .detections import CollectedDetections, ImageDetections, check_lengths, to_coco_results
from .ground_truth import CocoLike, GroundTruth, IouType, as_segmentation, require_json

__all__ = ["METRICS", "CocoEvaluator", "evaluate_coco", "format_table", "to_coco_results"]

# What COCO's table says of each number, in the order of COCOeval.stats: the threshold of IoU, the size of the objects,
# the number of detections per image.
_TABLE = {
    "AP": ("0.50:0.95", "all", 100),
    "AP50": ("0.50", "all", 100),
    "AP75": ("0.75", "all", 100),
    "APs": ("0.50:0.95", "small", 100),
    "APm": ("0.50:0.95", "medium", 100),
    "APl": ("0.50:0.95", "large", 100),
    "AR1": ("0.50:0.95", "all", 1),
    "AR10": ("0.50:0.95", "all", 10),
    "AR100": ("0.50:0.95", "all", 100),
    "ARs": ("0.50:0.95", "small", 100),
    "ARm": ("0.50:0.95", "medium", 100),
    "ARl": ("0.50:0.95", "large", 100),
}
METRICS = tuple(_TABLE)


class CocoEvaluator:
    """Collects the detections of images and computes COCO's metric over them.

    Args:
        ground_truth: the path of a COCO json, its content as a dict, or a COCO object of pycocotools.
        iou_type: ``"bbox"``, or ``"segm"`` for predictions with ``masks``.
        category_ids: ``category_ids[label]`` is the category id of a label, as ``CocoDataset.category_ids``; None
            where labels are category ids.
        image_ids: evaluate these images only; None for all of the ground truth. An evaluated image for which no
            update comes counts as one without detections.

    Raises:
        ValueError: for an unknown ``iou_type``, an unreadable file, no image at all, an image that is not in the
            ground truth, or a segmentation that cannot be understood. Annotations without any are left out.
    """

    def __init__(
        self,
        ground_truth: CocoLike | Mapping[str, Any] | str | Path,
        iou_type: IouType = "bbox",
        *,
        category_ids: Sequence[int] | Tensor | None = None,
        image_ids: Iterable[int] | None = None,
    ):
        self.iou_type = iou_type
        self.category_ids = None if category_ids is None else as_tensor(category_ids).cpu()
        self._ground_truth = GroundTruth.of(ground_truth, iou_type, image_ids)
        self.image_ids = self._ground_truth.image_ids
        self._evaluated = set(self.image_ids)
        self._detections = CollectedDetections(self.category_ids)

    def update(self, image_ids: Sequence[int], predictions: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the detections of some images. Of masks only the run lengths are kept.

        An image that was added before is ignored, since samplers repeat images to fill the last batch of every
        process; so is one that is not to be evaluated.

        Args:
            image_ids: ``B`` ids.
            predictions: per image ``{"scores": [N], "labels": [N], "boxes": [N, 4] xyxy in pixels of the original
                image[, "masks": [N, H, W] bool]}``, as ``postprocess`` returns them.

        Raises:
            ValueError: if the lengths differ or an image is not in the ground truth.
        """
        check_lengths(image_ids, predictions)
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            if image_id not in self._ground_truth.known_ids:
                raise ValueError(f"image {image_id} is not in the ground truth")
            if image_id in self._evaluated:
                self._detections.add(image_id, prediction)

    @property
    def state(self) -> dict[int, ImageDetections]:
        """The detections so far by image, in arrays, for ``gather_object`` and :meth:`merge`."""
        return self._detections.by_image

    def merge(self, states: Iterable[Mapping[int, ImageDetections]]) -> None:
        """Add the :attr:`state` of other processes; each image counts once, the first to come."""
        self._detections.merge(states)

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections so far in COCO's result format, by ascending image id."""
        return [result for results in self.results_by_image() for result in results]

    def results_by_image(self) -> Iterator[list[dict[str, Any]]]:
        """The same, image by image: of 5000 images they take half a gigabyte."""
        return self._detections.results()

    def summarize(self) -> dict[str, Any]:
        """COCO's twelve numbers under the names of :data:`METRICS`, and ``"per_category"``: AP by category name.

        A number without any ground truth to count (no large objects, say) is -1, as in pycocotools; the AP of a
        category without ground truth is None.

        Raises:
            ValueError: if a score is not finite.
        """
        self._detections.check_scores()
        return _evaluate(self._ground_truth, self._detections.by_image, self.iou_type)


def evaluate_coco(
    ground_truth: CocoLike | Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]] | str | Path,
    iou_type: IouType = "bbox",
) -> dict[str, Any]:
    """COCO's metric of detections in COCO's result format.

    Args:
        ground_truth: the path of a COCO json, its content as a dict, or a COCO object of pycocotools.
        results: entries with ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh in pixels) or
            ``segmentation`` (RLE), or the path of a json file that holds them.
        iou_type: ``"bbox"`` or ``"segm"``.

    Returns:
        As :meth:`CocoEvaluator.summarize`.

    Raises:
        ValueError: for an unknown ``iou_type``, an unreadable file, an entry without a needed key, or an image that
            is not in the ground truth.
    """
    truth = GroundTruth.of(ground_truth, iou_type)
    entries: Any = require_json(results, "result") if isinstance(results, (str, Path)) else results
    if not isinstance(entries, Sequence):
        raise ValueError("results must be a list of detections")
    needed = ("image_id", "category_id", "score", "bbox" if iou_type == "bbox" else "segmentation")
    sizes = dict(zip(truth.image_ids, truth.sizes, strict=True))
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    counts: dict[int, list[str]] = {}
    for index, result in enumerate(entries):
        for key in needed:
            if not isinstance(result, Mapping) or key not in result:
                raise ValueError(f'results[{index}] lacks the key "{key}"')
        image_id = result["image_id"]
        if image_id not in truth.known_ids:
            raise ValueError(f"results[{index}]: image {image_id} is not in the ground truth")
        by_image.setdefault(image_id, []).append(result)
        if iou_type == "segm":
            height, width = sizes[image_id]
            mask = as_segmentation(result, {"height": height, "width": width}, f"results[{index}]")
            if not mask:
                raise ValueError(f"results[{index}]: the segmentation is empty")
            counts.setdefault(image_id, []).append(_encoded(mask, height, width))
    packed = {
        image_id: _packed(of_image, counts.get(image_id), sizes[image_id]) for image_id, of_image in by_image.items()
    }
    return _evaluate(truth, packed, iou_type)


def _packed(results: list[Mapping[str, Any]], counts: list[str] | None, size: Any) -> ImageDetections:
    boxes = np.zeros((len(results), 4))
    if counts is None:
        boxes = np.array([result["bbox"] for result in results], dtype=np.float64)
    return ImageDetections(
        np.array([result["category_id"] for result in results], dtype=np.int64),
        np.array([result["score"] for result in results], dtype=np.float64),
        boxes,
        None if counts is None else size,
        None if counts is None else tuple(counts),
    )


def _encoded(mask: Any, height: Any, width: Any) -> str:
    """The compressed run lengths of polygons, or of what is compressed already."""
    if isinstance(mask, list):
        mask = hotcoco.mask.merge(hotcoco.mask.frPyObjects(mask, height, width))
    counts: bytes = mask["counts"]
    return counts.decode("ascii")


def format_table(metrics: Mapping[str, Any]) -> str:
    """The table that COCO users know, with the names of the numbers in front."""
    lines = []
    for name, (iou, area, detections) in _TABLE.items():
        title = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
        lines.append(
            f" {name:<5}  {title} @[ IoU={iou:<9} | area={area:>6s} | maxDets={detections:>3d} ] = {metrics[name]:0.3f}"
        )
    return "\n".join(lines)


def _evaluate(truth: GroundTruth, detections: Mapping[int, ImageDetections], iou_type: IouType) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        objects = _objects(truth)
        evaluation = hotcoco.COCOeval(objects, _found(objects, truth, detections, iou_type), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    accumulated = evaluation.eval
    assert accumulated is not None  # as it is after accumulate
    metrics: dict[str, Any] = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    metrics["per_category"] = _per_category(truth, accumulated["precision"])
    return metrics


def _objects(truth: GroundTruth) -> hotcoco.COCO:
    images = [
        {"id": number, "height": height, "width": width} if height is not None and width is not None else {"id": number}
        for number, (height, width) in enumerate(truth.sizes, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(truth.category_names, start=1)]
    return hotcoco.COCO.from_arrays(
        images,
        categories,
        truth.images,
        truth.categories,
        truth.boxes,
        ids=np.arange(1, len(truth.images) + 1),
        area=truth.areas,
        iscrowd=truth.crowds,
        segmentation=truth.segmentations,
    )


def _found(
    objects: hotcoco.COCO, truth: GroundTruth, detections: Mapping[int, ImageDetections], iou_type: IouType
) -> hotcoco.COCO:
    """The detections as the evaluation takes them: a row of image, box, score and category for each."""
    numbers = {category_id: number for number, category_id in enumerate(truth.category_ids, start=1)}
    rows = [np.empty((0, 7))]
    segmentations: list[Any] = []
    for number, image_id in enumerate(truth.image_ids, start=1):
        found = detections.get(image_id)
        if found is None:
            continue
        # Of a category that the ground truth does not have, nothing counts.
        categories = np.array([numbers.get(category, 0) for category in found.category_ids.tolist()], dtype=np.float64)
        known = categories > 0
        image = np.full(len(categories), number)
        rows.append(np.column_stack((image, found.boxes, found.scores, categories))[known])
        if iou_type == "segm":
            segmentations += [each for each, kept in zip(found.segmentations(), known, strict=True) if kept]
    table = np.concatenate(rows)
    if iou_type == "bbox" or not len(table):
        return objects.load_res(table)
    loaded = objects.load_res(table, segmentation=segmentations)
    # COCO's limits of small and large are for the areas of masks, which are not those of the boxes.
    loaded.update_anns(ids=np.arange(1, len(table) + 1), area=hotcoco.mask.area(segmentations))
    return loaded


def _per_category(truth: GroundTruth, precision: np.ndarray) -> dict[str, float | None]:
    # [thresholds, recalls, categories, areas, detections]: all areas, 100 detections; -1 where nothing counts.
    precision = precision[:, :, :, 0, -1]
    result: dict[str, float | None] = {}
    for index, name in enumerate(truth.distinct_names()):
        valid = precision[:, :, index][precision[:, :, index] > -1]
        result[name] = float(valid.mean()) if valid.size else None
    return result
