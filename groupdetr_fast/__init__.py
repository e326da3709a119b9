"""Group DETR training for PyTorch: the ops, the detectors, and the training loop."""

from typing import Any

from . import ops
from .build import build_criterion
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
    "DetectorOutput",
    "PackedTargets",
    "QueryGroups",
    "SegmentationOutput",
    "__version__",
    "build_criterion",
    "build_model",
    "export_checkpoint",
    "export_onnx",
    "export_program",
    "load_checkpoint",
    "load_model",
    "model_names",
    "ops",
    "postprocess",
    "predict",
]


def __getattr__(name: str) -> Any:
    """``load_model`` and ``predict``, which need the extra ``train``; the rest of the package does not."""
    if name in ("load_model", "predict"):
        from . import prediction

        return getattr(prediction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
