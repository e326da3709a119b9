"""Group DETR training for PyTorch: the ops, the detectors, and the training loop."""

from . import ops
from .groups import QueryGroups
from .targets import PackedTargets

__version__ = "0.1.0"

__all__ = ["PackedTargets", "QueryGroups", "__version__", "ops"]
