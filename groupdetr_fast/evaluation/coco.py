"""The COCO metric, by pycocotools."""

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..data.segmentations import Segmentation, parse_segmentation

__all__ = ["METRICS", "CocoEvaluator", "evaluate_coco", "format_table", "to_coco_results"]

IouType = Literal["bbox", "segm"]

# The order of COCOeval.stats.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# What the table says of each: the threshold of IoU, the size of the objects, the number of detections per image.
_ROWS = (
    ("0.50:0.95", "all", 100),
    ("0.50", "all", 100),
    ("0.75", "all", 100),
    ("0.50:0.95", "small", 100),
    ("0.50:0.95", "medium", 100),
    ("0.50:0.95", "large", 100),
    ("0.50:0.95", "all", 1),
    ("0.50:0.95", "all", 10),
    ("0.50:0.95", "all", 100),
    ("0.50:0.95", "small", 100),
    ("0.50:0.95", "medium", 100),
    ("0.50:0.95", "large", 100),
)


class CocoEvaluator:
    """Collects the detections of images and computes COCO's metric over them.

    Args:
        ground_truth: a COCO object, its content as a dict, or the path of its json file.
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
        ground_truth: COCO | Mapping[str, Any] | str | Path,
        iou_type: IouType = "bbox",
        *,
        category_ids: Sequence[int] | Tensor | None = None,
        image_ids: Iterable[int] | None = None,
    ):
        if iou_type not in ("bbox", "segm"):
            raise ValueError(f'iou_type must be "bbox" or "segm", got {iou_type!r}')
        self.iou_type = iou_type
        self.category_ids = None if category_ids is None else torch.as_tensor(category_ids).cpu()
        self._ground_truth = _with_positive_ids(_as_coco(ground_truth))
        if iou_type == "segm":
            self._ground_truth = _with_checked_masks(self._ground_truth)
        self._known = set(self._ground_truth.getImgIds())
        self._evaluated = self._known if image_ids is None else set(image_ids)
        if not self._evaluated:
            raise ValueError("there is no image to evaluate")
        if missing := self._evaluated - self._known:
            raise ValueError(f"image_ids: image {min(missing)} is not in the ground truth")
        self.image_ids = sorted(self._evaluated)
        self._results: dict[int, list[dict]] = {}

    def update(self, image_ids: Sequence[int], predictions: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the detections of some images.

        An image that was added before is ignored, since samplers repeat images to fill the last batch of every
        process; so is one that is not to be evaluated.

        Args:
            image_ids: ``B`` ids.
            predictions: per image ``{"scores": [N], "labels": [N], "boxes": [N, 4] xyxy in pixels of the original
                image[, "masks": [N, H, W] bool]}``, as ``postprocess`` returns them.

        Raises:
            ValueError: if the lengths differ or an image is not in the ground truth.
        """
        if len(image_ids) != len(predictions):
            raise ValueError(f"got {len(image_ids)} image ids and {len(predictions)} predictions")
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            if image_id not in self._known:
                raise ValueError(f"image {image_id} is not in the ground truth")
            if image_id in self._evaluated and image_id not in self._results:
                self._results[image_id] = to_coco_results([image_id], [prediction], self.category_ids)

    @property
    def state(self) -> dict[int, list[dict]]:
        """The detections so far by image, in plain Python types, for ``gather_object`` and :meth:`merge`."""
        return self._results

    def merge(self, states: Iterable[Mapping[int, list[dict]]]) -> None:
        """Add the :attr:`state` of other processes; each image counts once, the first to come."""
        for state in states:
            for image_id, results in state.items():
                self._results.setdefault(image_id, results)

    @property
    def results(self) -> list[dict]:
        """All detections so far in COCO's result format, by ascending image id."""
        return [result for image_id in sorted(self._results) for result in self._results[image_id]]

    def summarize(self) -> dict[str, Any]:
        """COCO's twelve numbers under the names of :data:`METRICS`, and ``"per_category"``: AP by category name.

        A number without any ground truth to count (no large objects, say) is -1, as in pycocotools; the AP of a
        category without ground truth is None.
        """
        return _evaluate(self._ground_truth, self.results, self.iou_type, self.image_ids)


def evaluate_coco(
    ground_truth: COCO | Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]] | str | Path,
    iou_type: IouType = "bbox",
) -> dict[str, Any]:
    """COCO's metric of detections in COCO's result format.

    Args:
        ground_truth: a COCO object, its content as a dict, or the path of its json file.
        results: entries with ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh in pixels) or
            ``segmentation`` (RLE), or the path of a json file that holds them.
        iou_type: ``"bbox"`` or ``"segm"``.

    Returns:
        As :meth:`CocoEvaluator.summarize`.

    Raises:
        ValueError: for an unknown ``iou_type``, an unreadable file, an entry without a needed key, or an image that
            is not in the ground truth.
    """
    evaluator = CocoEvaluator(ground_truth, iou_type)
    if isinstance(results, (str, Path)):
        results = _read_json(results, "result")
    known = set(evaluator.image_ids)
    needed = ("image_id", "category_id", "score", "bbox" if iou_type == "bbox" else "segmentation")
    if not isinstance(results, Sequence):
        raise ValueError("results must be a list of detections")
    for index, result in enumerate(results):
        for key in needed:
            if not isinstance(result, Mapping) or key not in result:
                raise ValueError(f'results[{index}] lacks the key "{key}"')
        if result["image_id"] not in known:
            raise ValueError(f"results[{index}]: image {result['image_id']} is not in the ground truth")
        if iou_type == "segm" and not _mask(evaluator._ground_truth, result, f"results[{index}]"):
            raise ValueError(f"results[{index}]: the segmentation is empty")
    return _evaluate(evaluator._ground_truth, results, iou_type, evaluator.image_ids)


def to_coco_results(
    image_ids: Sequence[int],
    predictions: Sequence[Mapping[str, Tensor]],
    category_ids: Sequence[int] | Tensor | None = None,
) -> list[dict[str, Any]]:
    """Predictions in COCO's result format, ready for json.

    Args:
        image_ids: ``B`` ids.
        predictions: as in :meth:`CocoEvaluator.update`.
        category_ids: category id of each label; None where labels are category ids.

    Raises:
        ValueError: if the lengths differ or ``category_ids`` has no entry for a label.
    """
    if len(image_ids) != len(predictions):
        raise ValueError(f"got {len(image_ids)} image ids and {len(predictions)} predictions")
    results = []
    for image_id, prediction in zip(image_ids, predictions, strict=True):
        categories = prediction["labels"].cpu()
        if category_ids is not None:
            outside = (categories < 0) | (categories >= len(category_ids))
            if outside.any():
                raise ValueError(
                    f"image {image_id}: label {int(categories[outside][0])} is not in [0, {len(category_ids)}), "
                    "the labels that category_ids knows"
                )
            categories = torch.as_tensor(category_ids)[categories]
        boxes = prediction["boxes"].detach().cpu().double()
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
        columns = (categories.tolist(), prediction["scores"].tolist(), boxes.tolist())
        entries = [
            {"image_id": image_id, "category_id": category, "score": score, "bbox": box}
            for category, score, box in zip(*columns, strict=True)
        ]
        for index, entry in enumerate(entries if "masks" in prediction else ()):
            entry["segmentation"] = _encode(prediction["masks"][index])
        results += entries
    return results


def format_table(metrics: Mapping[str, Any]) -> str:
    """The table that COCO users know, with the names of the numbers in front."""
    lines = []
    for name, (iou, area, detections) in zip(METRICS, _ROWS, strict=True):
        title = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
        lines.append(
            f" {name:<5}  {title} @[ IoU={iou:<9} | area={area:>6s} | maxDets={detections:>3d} ] = {metrics[name]:0.3f}"
        )
    return "\n".join(lines)


def _evaluate(
    ground_truth: COCO, results: Sequence[Mapping[str, Any]], iou_type: IouType, image_ids: list[int]
) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, _detections(ground_truth, results, iou_type), iou_type)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics: dict[str, Any] = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    metrics["per_category"] = _per_category(ground_truth, evaluation)
    return metrics


def _detections(ground_truth: COCO, results: Sequence[Mapping[str, Any]], iou_type: IouType) -> COCO:
    """What ``COCO.loadRes`` makes, which fails on an empty list and prints."""
    detections = COCO()
    annotations = []
    for index, result in enumerate(results):
        annotation = {**result, "id": index + 1, "iscrowd": 0}
        if iou_type == "bbox":
            annotation["area"] = result["bbox"][2] * result["bbox"][3]
        else:
            annotation["area"] = float(rle.area(result["segmentation"]))
        annotations.append(annotation)
    detections.dataset = {
        "images": ground_truth.dataset["images"],
        "categories": ground_truth.dataset["categories"],
        "annotations": annotations,
    }
    detections.createIndex()
    return detections


def _per_category(ground_truth: COCO, evaluation: COCOeval) -> dict[str, float | None]:
    # [thresholds, recalls, categories, areas, detections]: all areas, 100 detections; -1 where nothing counts.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = [category["name"] for category in ground_truth.loadCats(evaluation.params.catIds)]
    result = {}
    for index, (category_id, name) in enumerate(zip(evaluation.params.catIds, names, strict=True)):
        valid = precision[:, :, index][precision[:, :, index] > -1]
        key = name if names.count(name) == 1 else f"{name} ({category_id})"
        result[key] = float(valid.mean()) if valid.size else None
    return result


def _as_coco(ground_truth: COCO | Mapping[str, Any] | str | Path) -> COCO:
    if isinstance(ground_truth, COCO):
        return ground_truth
    if isinstance(ground_truth, (str, Path)):
        ground_truth = _read_json(ground_truth, "annotation")
    for key in ("images", "annotations", "categories"):
        if not isinstance(ground_truth, Mapping) or key not in ground_truth:
            raise ValueError(f'the ground truth lacks the key "{key}"')
    return _indexed(dict(ground_truth))


def _with_positive_ids(ground_truth: COCO) -> COCO:
    """The same ground truth with annotation ids from 1 where one of them is 0, which COCOeval takes for "no match"."""
    annotations = ground_truth.dataset["annotations"]
    if all(annotation["id"] != 0 for annotation in annotations):
        return ground_truth
    renumbered = [{**annotation, "id": index} for index, annotation in enumerate(annotations, start=1)]
    return _indexed({**ground_truth.dataset, "annotations": renumbered})


def _with_checked_masks(ground_truth: COCO) -> COCO:
    """The same ground truth with the annotations that have a mask, none of which makes pycocotools run on for ever."""
    masks = [
        (annotation, _mask(ground_truth, annotation, f"annotation {annotation['id']}"))
        for annotation in ground_truth.dataset["annotations"]
    ]
    kept = [{**annotation, "segmentation": mask} for annotation, mask in masks if mask is not None]
    return _indexed({**ground_truth.dataset, "annotations": kept})


def _mask(ground_truth: COCO, entry: Mapping[str, Any], who: str) -> Segmentation | None:
    image = ground_truth.imgs.get(entry["image_id"], {})
    try:
        return parse_segmentation(entry.get("segmentation", []), image.get("height"), image.get("width"))
    except ValueError as error:
        raise ValueError(f"{who}: the segmentation {error}") from None


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    # COCOeval writes into the annotations it evaluates; those of the caller stay as they are.
    coco.dataset = {**content, "annotations": [dict(annotation) for annotation in content["annotations"]]}
    for annotation in coco.dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)
        if "bbox" in annotation:
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _read_json(path: str | Path, kind: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{kind} file {path} cannot be read ({error.strerror}); give a readable json file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind} file {path} is not valid json ({error})") from None


def _encode(mask: Tensor) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
