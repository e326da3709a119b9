"""The detectors, one file each, and what is common to them: output, configuration, registry, post-processing."""

from .checkpoints import CheckpointMismatch, LoadReport, load_checkpoint
from .output import DetectorOutput
from .postprocess import postprocess
from .registry import build_model, model_config, model_names

__all__ = [
    "CheckpointMismatch",
    "DetectorOutput",
    "LoadReport",
    "build_model",
    "load_checkpoint",
    "model_config",
    "model_names",
    "postprocess",
]
