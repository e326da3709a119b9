"""COCO metrics, detections in COCO's result format, and pictures of them (extra ``train``)."""

from .coco import METRICS, CocoEvaluator, evaluate_coco, format_table, to_coco_results
from .visualize import draw_detections

__all__ = ["METRICS", "CocoEvaluator", "draw_detections", "evaluate_coco", "format_table", "to_coco_results"]
