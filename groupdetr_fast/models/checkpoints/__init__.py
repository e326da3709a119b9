"""Reading and writing checkpoints: this package's own, the original repositories', and transformers'."""

from .export import export_checkpoint
from .layouts import CheckpointMismatch
from .load import LoadReport, load_checkpoint
from .read import read_metadata

__all__ = ["CheckpointMismatch", "LoadReport", "export_checkpoint", "load_checkpoint", "read_metadata"]
