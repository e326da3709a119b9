"""A detector as a file for other runtimes, with the classes and the preparation of images written into it."""

import json
import logging
from pathlib import Path

import torch
from torch import nn

from .models.detector import Detector
from .models.inference_graph import export_onnx, export_program
from .prediction import EVAL_SETTINGS, InferenceSettings, settings_of

__all__ = ["check_suffix", "export_file"]


def check_suffix(path: Path) -> None:
    """Raise ValueError if a file of this name is none that :func:`export_file` writes."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"output must end in .onnx or .pt2, got {path}")


def export_file(
    model: nn.Module, path: str | Path, image_size: tuple[int, int] | None = None, *, masks: bool = False
) -> Path:
    """Write the inference graph of one group of queries.

    Args:
        model: a detector of boxes, on the CPU.
        path: file to write: ``.onnx`` (needs the extra export) or ``.pt2``, a ``torch.export`` program. It also holds
            the names and ids of the classes, and how images are to be prepared, as far as the model's checkpoint said.
        image_size: height and width of all images in pixels; None for a graph that takes any size.
        masks: whether the graph also takes masks of the images' padding, for batches of images of several sizes.

    Returns:
        The path.

    Raises:
        ValueError: for another ending, a model that predicts masks or one of transformers, or a missing extra.
    """
    path = Path(path)
    check_suffix(path)
    if not isinstance(model, Detector):
        raise ValueError("models of transformers are exported by other tools: load the checkpoint's folder with them")
    if model.config.predicts_masks:
        raise ValueError("models that predict masks cannot be exported")
    for name in ("onnx_ir", "onnxscript", "torch.onnx", "torch.export"):  # which tell of every node
        logging.getLogger(name).setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = _describe(settings_of(model))
    if path.suffix == ".pt2":
        torch.export.save(export_program(model, image_size, masks=masks), path, extra_files=described)
        return path
    try:
        export_onnx(model, path, image_size, masks=masks, metadata=described)
    except ImportError as error:
        raise ValueError(f"{error}: ONNX needs pip install 'groupdetr_fast[export]'") from error
    return path


def _describe(settings: InferenceSettings) -> dict[str, str]:
    """The settings as json, by name."""
    values = {"class_names": settings.class_names, "category_ids": settings.category_ids}
    values |= {name: getattr(settings.augmentation, name) for name in EVAL_SETTINGS}
    return {name: json.dumps(value) for name, value in values.items()}
