"""A detector as a file for other runtimes, with the classes and the preparation of images written into it."""

import json
import logging
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from .engines import EngineSettings, build_engine, require_tensorrt
from .files import write_json
from .models.detector import Detector
from .models.inference_graph import export_onnx, export_program
from .prediction import EVAL_SETTINGS, InferenceSettings, settings_of

__all__ = ["check_output", "export_file"]

SUFFIXES = (".onnx", ".pt2", ".engine")


def check_output(path: Path, *, half: bool = False, engine: EngineSettings | None = None) -> None:
    """Raise what :func:`export_file` would raise for any model, before one is read.

    Args:
        path, half, engine: as in :func:`export_file`.

    Raises:
        ValueError: as :func:`export_file`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output must end in .onnx, .pt2 or .engine, got {path}")
    if half and path.suffix == ".pt2":
        raise ValueError(f"half is for .onnx and .engine, got {path}: run a program under torch.autocast instead")
    if engine is not None and engine.given and path.suffix != ".engine":
        raise ValueError(f"{engine.given[0]} is for .engine, got {path}")
    if path.suffix == ".engine":
        require_tensorrt()
    if path.suffix != ".pt2":
        for package in ("onnx", "onnxscript"):
            if find_spec(package) is None:
                raise ValueError(f"{package} is missing: ONNX needs pip install 'groupdetr_fast[export]'")


def export_file(
    model: nn.Module,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
    *,
    masks: bool = False,
    half: bool = False,
    engine: EngineSettings | None = None,
) -> Path:
    """Write the inference graph of one group of queries.

    Args:
        model: a detector of boxes, on the CPU.
        path: file to write: ``.onnx`` (needs the extra export), ``.pt2``, a ``torch.export`` program, or ``.engine``,
            of TensorRT (needs the extra export, TensorRT and the GPU that is to run it). It also holds the names and
            ids of the classes, and how images are to be prepared, as far as the model's checkpoint said; those of an
            engine are in a ``.json`` beside it, since its own format has no place for them.
        image_size: height and width of all images in pixels; None for a graph that takes any size, as an engine does
            within its shapes.
        masks: whether the graph also takes masks of the images' padding, for batches of images of several sizes.
        half: matrix products and convolutions in float16, see :func:`groupdetr_fast.export_onnx`; not for ``.pt2``.
        engine: sizes of images and memory of an engine; None for the defaults.

    Returns:
        The path.

    Raises:
        ValueError: for another ending, a setting that files of this ending do not have, a model that predicts masks or
            one of transformers, a missing extra, and where TensorRT is missing or refuses.
    """
    path = Path(path)
    check_output(path, half=half, engine=engine)
    if not isinstance(model, Detector):
        raise ValueError("models of transformers are exported by other tools: load the checkpoint's folder with them")
    if model.config.predicts_masks:
        raise ValueError("models that predict masks cannot be exported")
    for name in ("onnx_ir", "onnxscript", "torch.onnx", "torch.export"):  # which tell of every node
        logging.getLogger(name).setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = _describe(settings_of(model))
    metadata = {name: json.dumps(value) for name, value in described.items()}
    if path.suffix == ".pt2":
        torch.export.save(export_program(model, image_size, masks=masks), path, extra_files=metadata)
    elif path.suffix == ".onnx":
        export_onnx(model, path, image_size, masks=masks, half=half, metadata=metadata)
    else:
        engine = engine or EngineSettings()
        sizes = settings_of(model).augmentation
        profile = engine.profile(sizes.eval_short_side, sizes.eval_max_size, square=sizes.square, image_size=image_size)
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "model.onnx"
            export_onnx(model, graph, image_size, masks=masks, half=half, metadata=metadata)
            build_engine(graph, path, profile, workspace=engine.workspace)
        write_json(path.with_suffix(".json"), described)
    return path


def _describe(settings: InferenceSettings) -> dict[str, object]:
    """The settings by name."""
    values: dict[str, object] = {"class_names": settings.class_names, "category_ids": settings.category_ids}
    return values | {name: getattr(settings.augmentation, name) for name in EVAL_SETTINGS}
