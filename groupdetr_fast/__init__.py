"""Group DETR training for PyTorch: the ops, the detectors, and the training loop."""

from . import ops
from .build import build_criterion
from .groups import QueryGroups
from .models import DetectorOutput, build_model, load_checkpoint, model_names, postprocess
from .targets import PackedTargets

__version__ = "0.1.0"

__all__ = [
    "DetectorOutput",
    "PackedTargets",
    "QueryGroups",
    "__version__",
    "build_criterion",
    "build_model",
    "load_checkpoint",
    "model_names",
    "ops",
    "postprocess",
]
