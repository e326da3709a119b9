"""Detections in arrays, image by image, and in COCO's result format."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np
import torch
from torch import Tensor

__all__ = ["CollectedDetections", "ImageDetections", "to_coco_results"]


@dataclass(frozen=True)
class ImageDetections:
    """The ``N`` detections of one image, small enough to keep those of thousands of images.

    Attributes:
        category_ids: ``[N]`` int64.
        scores: ``[N]`` float64.
        boxes: ``[N, 4]`` float64, xywh in pixels.
        size: (height, width) of the image, where there are masks.
        counts: compressed run lengths of the masks; None if there are none.
    """

    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int] | None = None
    counts: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, image_id: int, prediction: Mapping[str, Tensor], category_ids: Sequence[int] | Tensor | None
    ) -> "ImageDetections":
        """See :func:`to_coco_results`."""
        categories = prediction["labels"].cpu()
        if category_ids is not None:
            outside = (categories < 0) | (categories >= len(category_ids))
            if outside.any():
                raise ValueError(
                    f"image {image_id}: label {int(categories[outside][0])} is not in [0, {len(category_ids)}), "
                    "the labels that category_ids knows"
                )
            categories = torch.as_tensor(category_ids)[categories]
        corners = prediction["boxes"].detach().cpu().double().numpy()
        boxes = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
        scores = prediction["scores"].detach().cpu().double().numpy()
        if "masks" not in prediction:
            return cls(categories.numpy(), scores, boxes)
        masks = prediction["masks"]
        height, width = masks.shape[-2:]
        return cls(categories.numpy(), scores, boxes, (height, width), _run_lengths(masks))

    def results(self, image_id: int) -> list[dict[str, Any]]:
        """The entries of COCO's result format."""
        columns = (self.category_ids.tolist(), self.scores.tolist(), self.boxes.tolist())
        entries: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": category, "score": score, "bbox": box}
            for category, score, box in zip(*columns, strict=True)
        ]
        for entry, segmentation in zip(entries, self.segmentations(), strict=False):
            entry["segmentation"] = segmentation
        return entries

    def segmentations(self) -> list[dict[str, Any]]:
        """The masks as COCO has them; none if there are none."""
        if self.counts is None or self.size is None:
            return []
        return [{"size": list(self.size), "counts": counts} for counts in self.counts]


@dataclass
class CollectedDetections:
    """Detections of many images, of one process or of several.

    Attributes:
        category_ids: ``category_ids[label]`` is the category id of a label; None where labels are category ids.
        by_image: the detections so far; what processes send to each other.
    """

    category_ids: Sequence[int] | Tensor | None = None
    by_image: dict[int, ImageDetections] = field(default_factory=dict)

    def add(self, image_id: int, prediction: Mapping[str, Tensor]) -> None:
        """Add the detections of an image, unless it was added before."""
        if image_id not in self.by_image:
            self.by_image[image_id] = ImageDetections.of(image_id, prediction, self.category_ids)

    def merge(self, others: Iterable[Mapping[int, ImageDetections]]) -> None:
        """Add what other processes have; each image counts once, the first to come."""
        for other in others:
            for image_id, detections in other.items():
                self.by_image.setdefault(image_id, detections)

    def check_scores(self) -> None:
        """Raises ValueError for a score that is not finite, which has no place in an order."""
        for image_id, detections in self.by_image.items():
            if not np.isfinite(detections.scores).all():
                raise ValueError(
                    f"image {image_id}: the detector gives scores that are not finite: look at its weights, which too "
                    "high a learning rate spoils, and at image_mean and image_std"
                )

    def results(self) -> Iterator[list[dict[str, Any]]]:
        """COCO's result format, image by image, by ascending id."""
        for image_id in sorted(self.by_image):
            yield self.by_image[image_id].results(image_id)


def to_coco_results(
    image_ids: Sequence[int],
    predictions: Sequence[Mapping[str, Tensor]],
    category_ids: Sequence[int] | Tensor | None = None,
) -> list[dict[str, Any]]:
    """Predictions in COCO's result format, ready for json.

    Args:
        image_ids: ``B`` ids.
        predictions: as in ``CocoEvaluator.update``.
        category_ids: category id of each label; None where labels are category ids.

    Raises:
        ValueError: if the lengths differ or ``category_ids`` has no entry for a label.
    """
    check_lengths(image_ids, predictions)
    return [
        result
        for image_id, prediction in zip(image_ids, predictions, strict=True)
        for result in ImageDetections.of(image_id, prediction, category_ids).results(image_id)
    ]


def check_lengths(image_ids: Sequence[int], predictions: Sequence[Any]) -> None:
    """Raises ValueError unless there are as many of both."""
    if len(image_ids) != len(predictions):
        raise ValueError(f"got {len(image_ids)} image ids and {len(predictions)} predictions")


def _run_lengths(masks: Tensor) -> tuple[str, ...]:
    """Compressed run lengths of masks ``[N, H, W]``, of which no more than their bytes is kept.

    COCO's runs go down the columns: a GPU turns the masks by itself, and a CPU one after another, as all together leave
    its cache.
    """
    masks = masks.to(torch.bool)
    if masks.device.type == "cpu":
        pixels = list(masks.view(torch.uint8).numpy())
    else:
        pixels = [columns.T for columns in masks.transpose(1, 2).contiguous().cpu().view(torch.uint8).numpy()]
    return tuple(hotcoco.mask.encode(mask)["counts"].decode("ascii") for mask in pixels)
