"""COCO metrics, detections in COCO's result format, and pictures of them (extra ``train``)."""

from .coco import METRICS, CocoEvaluator, evaluate_coco, format_table, to_coco_results
from .diagnosis import Diagnosis, diagnose
from .visualize import draw_detections, draw_image

__all__ = [
    "METRICS",
    "CocoEvaluator",
    "Diagnosis",
    "diagnose",
    "draw_detections",
    "draw_image",
    "evaluate_coco",
    "format_table",
    "to_coco_results",
]
