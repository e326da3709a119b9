"""What detections get wrong, by class and by kind: what a COCO table does not say."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from ..data.segmentations import to_run_lengths
from .ground_truth import CocoLike, GroundTruth, IouType

__all__ = ["ERRORS", "ClassDiagnosis", "Diagnosis", "ImageDiagnosis", "diagnose"]

MATCH_IOU = 0.5  # from which a detection and an object are one
NEAR_IOU = 0.1  # from which a detection is near an object
DETECTIONS_PER_IMAGE = 100  # the best ones, as in COCO's metric

# The kinds of TIDE (Bolya et al., ECCV 2020) in plain words, in the order in which an error is tried to be explained.
ERRORS = {
    "place": "near an object of its class (IoU 0.1 to 0.5)",
    "class": "on an object of another class (IoU 0.5 or more)",
    "double": "on an object of its class that a surer detection has",
    "background": "near no object (IoU below 0.1)",
    "class and place": "near an object of another class only (IoU 0.1 to 0.5)",
    "missed": "an object that no detection is on, nor nearly",
}

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class ClassDiagnosis:
    """One class at IoU 0.5.

    Attributes:
        name: of the category.
        objects: how many there are, crowds aside.
        scores, precisions, recalls: what is found with every detection down to one's score, descending by score.
        threshold: the score from which detections are kept for the best F1; None if none is right.
    """

    name: str
    objects: int
    scores: Floats
    precisions: Floats
    recalls: Floats
    threshold: float | None

    @property
    def at_threshold(self) -> tuple[float, float, float]:
        """Precision, recall and F1 of the detections from :attr:`threshold` on; zeros where there is none."""
        if self.threshold is None:
            return 0.0, 0.0, 0.0
        last = int(np.flatnonzero(self.scores >= self.threshold)[-1])
        precision, recall = float(self.precisions[last]), float(self.recalls[last])
        return precision, recall, 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class ImageDiagnosis:
    """One image, each class at its threshold.

    Attributes:
        image_id: of the image.
        wrong: detections that are wrong.
        missed: objects that are not detected.
    """

    image_id: int
    wrong: int
    missed: int


@dataclass(frozen=True)
class Diagnosis:
    """What detections get right and wrong.

    Attributes:
        classes: by ascending category id; all below keeps the detections from their thresholds on.
        confusion: ``[C + 1, C + 1]``: objects of a class (row) that were detected as a class (column). The last row are
            detections on no object of their own, the last column objects without a detection.
        correct: detections that are right.
        errors: how many there are of each kind of :data:`ERRORS`.
        images: every image, the worst first.
    """

    classes: tuple[ClassDiagnosis, ...]
    confusion: NDArray[np.int64]
    correct: int
    errors: Mapping[str, int]
    images: tuple[ImageDiagnosis, ...]


def diagnose(
    ground_truth: CocoLike | Mapping[str, Any] | str | Path,
    results: Iterable[Mapping[str, Any]],
    iou_type: IouType = "bbox",
) -> Diagnosis:
    """Find out what detections get wrong.

    Args:
        ground_truth: as :class:`~groupdetr_fast.evaluation.CocoEvaluator` takes it.
        results: detections in COCO's result format; of each image the best 100 count.
        iou_type: whether the IoU is that of boxes or of masks.

    Returns:
        See :class:`Diagnosis`. Detections on crowds count as neither right nor wrong, as in COCO's metric.

    Raises:
        ValueError: for a ground truth that cannot be used.
    """
    truth = GroundTruth.of(ground_truth, iou_type)
    known = frozenset(truth.category_ids)
    detections = defaultdict(list)
    for result in results:
        if result["category_id"] in known:
            detections[result["image_id"]].append(result)
    images = [_Image(truth, number, detections[image_id]) for number, image_id in enumerate(truth.image_ids, start=1)]
    classes = tuple(_diagnose_class(name, label, images) for label, name in enumerate(truth.distinct_names()))
    thresholds = np.array([np.inf if each.threshold is None else each.threshold for each in classes])
    confusion = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
    errors = dict.fromkeys(ERRORS, 0)
    correct, rows = 0, []
    for image in images:
        found = image.explain(thresholds, confusion, errors)
        correct += found.correct
        rows.append(ImageDiagnosis(image.image_id, found.wrong, found.missed))
    rows.sort(key=lambda row: -(row.wrong + row.missed))
    return Diagnosis(classes, confusion, correct, errors, tuple(rows))


@dataclass(frozen=True)
class _Found:
    correct: int
    wrong: int
    missed: int


class _Image:
    """The objects and detections of an image, and which detection is on which object.

    Attributes:
        labels, scores: of the detections, descending by score.
        on_object: the object that a detection of the same class is on, or -1, at most one detection an object.
        ignored: detections on a crowd of their class, which do not count.
        object_labels: of the objects, crowds aside.
    """

    def __init__(self, truth: GroundTruth, number: int, detections: Sequence[Mapping[str, Any]]):
        """The image with this number in the ground truth, counted from 1."""
        self.image_id = truth.image_ids[number - 1]
        objects = truth.objects_of(number)
        objects = objects[np.argsort(truth.crowds[objects], kind="stable")]  # crowds last: the others keep their places
        crowd = truth.crowds[objects].astype(bool)
        detections = sorted(detections, key=lambda each: -each["score"])[:DETECTIONS_PER_IMAGE]
        self.labels = np.searchsorted(truth.category_ids, [each["category_id"] for each in detections])
        self.scores = np.array([each["score"] for each in detections], dtype=np.float64)
        every_label = truth.categories[objects] - 1
        self.object_labels = every_label[~crowd]
        overlaps = _overlaps(truth, number, detections, objects)
        count = len(self.object_labels)
        self.overlaps = overlaps[:, :count]
        of_class = self.labels[:, None] == every_label[None]
        self.on_object = _match(np.where(of_class[:, :count], self.overlaps, 0.0))
        on_crowd = ((overlaps[:, count:] >= MATCH_IOU) & of_class[:, count:]).any(1)
        self.ignored = (self.on_object < 0) & on_crowd

    def explain(self, thresholds: Floats, confusion: NDArray[np.int64], errors: dict[str, int]) -> _Found:
        """Add the image to a confusion matrix and to the counts of errors, keeping detections from thresholds on."""
        # Matching goes from the surest down, so that what is left out takes no object from what is kept.
        kept = np.flatnonzero((self.scores >= thresholds[self.labels]) & ~self.ignored)
        labels, overlaps, on_object = self.labels[kept], self.overlaps[kept], self.on_object[kept]
        right = on_object >= 0
        taken = np.zeros(len(self.object_labels), dtype=bool)
        taken[on_object[right]] = True
        nothing = len(thresholds)

        np.add.at(confusion, (self.object_labels[taken], self.object_labels[taken]), 1)
        mistaken = _match(np.where(right[:, None] | taken[None], 0.0, overlaps))  # for objects of other classes
        rows = np.where(mistaken >= 0, self.object_labels[mistaken] if len(self.object_labels) else nothing, nothing)
        np.add.at(confusion, (rows[~right], labels[~right]), 1)
        undetected = ~taken
        undetected[mistaken[mistaken >= 0]] = False
        np.add.at(confusion, (self.object_labels[undetected], nothing), 1)

        explained = taken.copy()
        for index in np.flatnonzero(~right):
            kind, which = self._kind(labels[index], overlaps[index])
            errors[kind] += 1
            if kind in ("place", "class"):
                explained[which] = True
        errors["missed"] += int((~explained).sum())
        return _Found(int(right.sum()), int((~right).sum()), int((~taken).sum()))

    def _kind(self, label: int, overlaps: Floats) -> tuple[str, int]:
        """The kind of error that a detection is, and the object that it is about; -1 for none."""
        own = np.where(self.object_labels == label, overlaps, 0.0)
        other = np.where(self.object_labels == label, 0.0, overlaps)
        best_own, best_other = (each.max(initial=0.0) for each in (own, other))
        if NEAR_IOU <= best_own < MATCH_IOU:
            return "place", int(own.argmax())
        if best_other >= MATCH_IOU:
            return "class", int(other.argmax())
        if best_own >= MATCH_IOU:
            return "double", int(own.argmax())
        return ("background", -1) if best_other < NEAR_IOU else ("class and place", int(other.argmax()))


def _overlaps(
    truth: GroundTruth, number: int, detections: Sequence[Mapping[str, Any]], objects: NDArray[np.int64]
) -> Floats:
    """IoU ``[detections, objects]``; with crowds the share of the detection that lies on them."""
    if not detections or not len(objects):
        return np.zeros((len(detections), len(objects)))
    ours: Any
    theirs: Any
    if truth.segmentations is None:
        ours = np.array([each["bbox"] for each in detections], dtype=np.float64)
        theirs = truth.boxes[objects]
    else:
        size: Any = truth.sizes[number - 1]  # without which no polygon would have been understood
        ours = [each["segmentation"] for each in detections]
        theirs = [to_run_lengths(truth.segmentations[index], *size) for index in objects]
    return np.asarray(rle.iou(ours, theirs, truth.crowds[objects].tolist()))


def _match(overlaps: Floats) -> NDArray[np.int64]:
    """The column of each row, from the first row to the last: the largest one that is left and at least 0.5, or -1."""
    columns = np.full(len(overlaps), -1, dtype=np.int64)
    left = overlaps.copy()
    for row in np.flatnonzero((overlaps >= MATCH_IOU).any(1)):
        column = int(left[row].argmax())
        if left[row, column] >= MATCH_IOU:
            columns[row] = column
            left[:, column] = 0
    return columns


def _diagnose_class(name: str, label: int, images: Sequence[_Image]) -> ClassDiagnosis:
    objects = sum(int((image.object_labels == label).sum()) for image in images)
    chosen = [(image, (image.labels == label) & ~image.ignored) for image in images]
    scores = np.concatenate([image.scores[rows] for image, rows in chosen] or [np.zeros(0)])
    right = np.concatenate([image.on_object[rows] >= 0 for image, rows in chosen] or [np.zeros(0, dtype=bool)])
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    found = np.cumsum(right)
    precisions = found / np.arange(1, len(found) + 1)
    recalls = found / max(objects, 1)
    threshold = None
    if objects and right.any():
        # Detections of one score are kept together.
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
        f1 = 2 * found[last] / (last + 1 + objects)
        threshold = float(scores[last[int(f1.argmax())]])
    return ClassDiagnosis(name, objects, scores, precisions, recalls, threshold)
