"""Detections for the package supervision, and so for trackers, annotators and zones (extra ``supervision``)."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from supervision import Detections

__all__ = ["to_supervision"]


def to_supervision(detection: Mapping[str, Any]) -> "Detections":
    """The detections of one image as ``supervision.Detections``.

    Args:
        detection: as ``predict`` returns it for one image, and ``predict_video`` for one frame.

    Returns:
        ``xyxy [k, 4]`` float32, ``confidence [k]`` float32, ``class_id [k]`` int64, the label, and
        ``data["class_name"] [k]``; with masks ``mask [k, H, W]`` bool.

    Raises:
        TypeError: for anything but the dictionary of one image.
        ValueError: if supervision is not installed.
    """
    if not isinstance(detection, Mapping) or "boxes" not in detection:
        raise TypeError(f"expected the detections of one image, a dictionary, got {type(detection).__name__}")
    if find_spec("supervision") is None:
        raise ValueError("to_supervision needs supervision: pip install 'groupdetr_fast[train,supervision]'")
    from supervision import Detections

    masks = detection.get("masks")
    return Detections(
        xyxy=detection["boxes"].float().reshape(-1, 4).numpy(),
        confidence=detection["scores"].float().numpy(),
        class_id=detection["labels"].numpy().astype(np.int64),
        mask=None if masks is None else masks.numpy().astype(bool),
        data={"class_name": np.array(detection["class_names"], dtype=str)},
    )
