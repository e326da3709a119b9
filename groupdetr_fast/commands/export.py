"""The command ``groupdetr export``."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.inference_graph import export_onnx, export_program
from ..prediction import EVAL_SETTINGS, InferenceSettings, load_model
from .flags import CheckpointArgument, DetectorFlags, named

__all__ = ["ExportCommand"]


@dataclass(frozen=True, kw_only=True)
class ExportCommand(DetectorFlags):
    """Write a detector's inference graph of one group of queries, as ONNX or as a torch.export program.

    The file also holds the names and ids of the classes, and how images are to be prepared, as far as the checkpoint
    says.

    Attributes:
        checkpoint: file or folder of this package, such as that of a run, of an original repository or transformers.
        output: file to write: ``.onnx`` (needs the extra export) or ``.pt2``.
        image_size: height and width of all images in pixels; None for a graph that takes any size.
        masks: whether the graph also takes masks of the images' padding, for batches of images of several sizes.
    """

    checkpoint: CheckpointArgument = None
    output: Path
    image_size: tuple[int, int] | None = None
    masks: bool = False

    def __call__(self) -> None:
        if self.output.suffix not in (".onnx", ".pt2"):
            raise ValueError(f"output must end in .onnx or .pt2, got {self.output}")
        checkpoint = named(self.checkpoint, "groupdetr export CHECKPOINT --output FILE")
        model = load_model(checkpoint, device="cpu", **self.detector_settings())
        if model.config.predicts_masks:
            raise ValueError("models that predict masks cannot be exported")
        for name in ("onnx_ir", "onnxscript", "torch.onnx", "torch.export"):  # which tell of every node
            logging.getLogger(name).setLevel(logging.ERROR)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        described = _describe(model.inference_settings)
        if self.output.suffix == ".pt2":
            program = export_program(model, self.image_size, masks=self.masks)
            torch.export.save(program, self.output, extra_files=described)
        else:
            try:
                export_onnx(model, self.output, self.image_size, masks=self.masks, metadata=described)
            except ImportError as error:
                raise ValueError(f"{error}: ONNX needs pip install 'groupdetr_fast[export]'") from error
        print(f"{self.output}: {self.output.stat().st_size / 1e6:.1f} MB")


def _describe(settings: InferenceSettings) -> dict[str, str]:
    """The settings as json, by name."""
    values = {"class_names": settings.class_names, "category_ids": settings.category_ids}
    values |= {name: getattr(settings.augmentation, name) for name in EVAL_SETTINGS}
    return {name: json.dumps(value) for name, value in values.items()}
