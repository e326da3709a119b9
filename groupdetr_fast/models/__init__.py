"""The detectors, one file each, and what is common to them: output, configuration, registry, post-processing."""

from .checkpoints import CheckpointMismatch, LoadReport, export_checkpoint, load_checkpoint
from .detector import Detector
from .inference_graph import export_onnx, export_program
from .output import DenoisingOutput, DetectorOutput, EncoderOutput, SegmentationOutput
from .postprocess import postprocess
from .registry import build_model, model_config, model_names

__all__ = [
    "CheckpointMismatch",
    "DenoisingOutput",
    "Detector",
    "DetectorOutput",
    "EncoderOutput",
    "LoadReport",
    "SegmentationOutput",
    "build_model",
    "export_checkpoint",
    "export_onnx",
    "export_program",
    "load_checkpoint",
    "model_config",
    "model_names",
    "postprocess",
]
