"""Reading checkpoints: this package's own, the original repositories', and transformers'."""

from .load import CheckpointMismatch, LoadReport, load_checkpoint

__all__ = ["CheckpointMismatch", "LoadReport", "load_checkpoint"]
