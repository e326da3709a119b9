"""Reading and writing checkpoints: this package's own, the original repositories', and transformers'."""

from .export import export_checkpoint
from .header import CheckpointHeader, build_detector
from .layouts import CheckpointMismatch
from .load import LoadReport, load_checkpoint
from .read import read_header

__all__ = [
    "CheckpointHeader",
    "CheckpointMismatch",
    "LoadReport",
    "build_detector",
    "export_checkpoint",
    "load_checkpoint",
    "read_header",
]
