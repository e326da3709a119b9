"""Reading and writing checkpoints: this package's own, the original repositories', and transformers'."""

from .export import export_checkpoint
from .header import CheckpointHeader, build_detector
from .layouts import CheckpointMismatch
from .load import LoadReport, load_checkpoint
from .read import find_weights, read_header

__all__ = [
    "CheckpointHeader",
    "CheckpointMismatch",
    "LoadReport",
    "build_detector",
    "export_checkpoint",
    "find_weights",
    "load_checkpoint",
    "read_header",
]
