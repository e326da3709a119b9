"""Detections as COCO's tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from ...evaluation.coco import to_coco_results
from ...prediction import InferenceSettings

__all__ = ["as_entries", "categories"]


def as_entries(detection: Mapping[str, Any], settings: InferenceSettings) -> list[dict[str, Any]]:
    """The detections of an image: category_id, score, bbox, area and, with masks, segmentation."""
    tensors = {name: value for name, value in detection.items() if name != "class_names"}
    entries = to_coco_results([0], [tensors], settings.category_ids)
    for index, entry in enumerate(entries):
        del entry["image_id"]
        masks = detection.get("masks")
        entry["area"] = entry["bbox"][2] * entry["bbox"][3] if masks is None else float(masks[index].sum())
    return entries


def categories(settings: InferenceSettings, detected: Iterable[int]) -> list[dict[str, Any]]:
    """Those that the checkpoint names, and those of the detections."""
    named = dict(zip(settings.category_ids or (), settings.class_names, strict=True))
    ids = sorted({*detected, *(category_id for category_id, name in named.items() if name != str(category_id))})
    return [{"id": category_id, "name": named.get(category_id, str(category_id))} for category_id in ids]
