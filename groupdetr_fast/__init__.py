"""Group DETR training for PyTorch: the ops, the detectors, and the training loop."""

from typing import Any

from . import ops
from .build import build_criterion
from .group_check import check_groups
from .groups import QueryGroups
from .models import (
    DetectorOutput,
    SegmentationOutput,
    build_model,
    export_checkpoint,
    export_onnx,
    export_program,
    load_checkpoint,
    model_names,
    postprocess,
)
from .targets import PackedTargets

__version__ = "0.1.0"

__all__ = [
    "Detector",
    "DetectorOutput",
    "PackedTargets",
    "QueryGroups",
    "SegmentationOutput",
    "__version__",
    "build_criterion",
    "build_model",
    "check_groups",
    "export_checkpoint",
    "export_onnx",
    "export_program",
    "load_checkpoint",
    "load_model",
    "model_names",
    "ops",
    "postprocess",
    "predict",
    "predict_video",
    "to_supervision",
]


def __getattr__(name: str) -> Any:
    """``Detector`` and what belongs to prediction, which need the extra ``train``, as the rest does not."""
    if name == "Detector":
        from .detector import Detector

        return Detector
    if name in ("load_model", "predict", "predict_video", "to_supervision"):
        from . import prediction

        return getattr(prediction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
