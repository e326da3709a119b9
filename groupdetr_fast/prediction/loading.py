"""From a checkpoint to a detector."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..models import load_checkpoint
from ..models.checkpoints import CheckpointHeader, build_detector, read_header
from ..models.checkpoints.read import read_checkpoint
from ..models.detector import Detector
from ..transformers_detector.families import (
    FAMILIES,
    PREFIX,
    check_accelerate_kernels,
    model_type_in,
    of_transformers,
    require_transformers,
)
from .settings import InferenceSettings

if TYPE_CHECKING:
    from ..transformers_detector.detector import TransformersDetector

__all__ = ["describe_model", "load_model"]


def describe_model(checkpoint: str | Path, model: str | None = None) -> CheckpointHeader:
    """The header of a checkpoint, with the name of the detector, and its settings as far as the checkpoint tells.

    Args:
        checkpoint: file or folder; or ``transformers:DIR_OR_ID``, a model of transformers as it is.
        model: the detector's name, which takes precedence over that in the checkpoint.

    Raises:
        ValueError: if neither names the detector, or the checkpoint cannot be read.
    """
    if of_transformers(checkpoint):
        return _describe_transformers(str(checkpoint))
    header = read_header(checkpoint)
    if header.transformers:
        return header
    unnamed = model is None and header.model is None
    if of_transformers(model) or (unnamed and model_type_in(Path(checkpoint)) in FAMILIES):
        return _describe_transformers(f"{PREFIX}{checkpoint}")
    if model and model != header.model:
        header = replace(header, model=model, model_config={})
    if header.model is None:
        read_checkpoint(checkpoint)  # which says so where there are no weights at all
        raise ValueError(
            f"checkpoint {checkpoint} does not say which detector it is of: pass --model (model=... in Python)"
        )
    return header


def _describe_transformers(name: str) -> CheckpointHeader:
    from ..transformers_detector.source import read_source

    return read_source(name).header()


def load_model(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    num_groups: int = 1,
    accelerate_kernels: bool = True,
    device: torch.device | str | None = None,
    **settings: Any,
) -> "Detector | TransformersDetector":
    """Build the detector that a checkpoint is of, and load it, for inference.

    Args:
        checkpoint: file or folder of this package, an original repository or transformers; or
            ``transformers:DIR_OR_ID``, for a model of transformers to run in transformers' own code.
        model: name of the detector, for checkpoints without it (this package stores it).
        num_classes: the same, for the number of classes; by default that of the original model (91 with COCO's ids as
            labels, and 80 for Mask2Former).
        num_groups: groups of queries to keep; inference uses the first.
        accelerate_kernels: let a model of transformers compute with the kernels of this package.
        device: None for a GPU if there is one.
        **settings: sizes of the detector, as in ``build_model``, for checkpoints of other sizes than the original ones
            that do not say so.

    Returns:
        The detector in eval mode. Its ``inference_settings`` are what :func:`predict` goes by.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the detector is not named, the checkpoint does not fit it, the device is not there, or
            ``accelerate_kernels`` is off for a detector of this package.
    """
    device = _find_device(device)
    header = describe_model(checkpoint, model)
    changes = settings if num_classes is None else {**settings, "num_classes": num_classes}
    detector: Detector | TransformersDetector
    if header.transformers:
        if changes:
            raise ValueError(f"{next(iter(changes))} cannot be set for {header.model}: its own configuration has it")
        require_transformers()
        from ..transformers_detector.build import load_detector

        detector, _ = load_detector(checkpoint, num_groups=num_groups, accelerate_kernels=accelerate_kernels)
    else:
        check_accelerate_kernels(accelerate_kernels, header.model)
        detector = build_detector(header, num_groups=num_groups, **changes)
        load_checkpoint(detector, checkpoint)
    cast(Any, detector).inference_settings = InferenceSettings.from_header(header)
    return detector.to(device).eval()


def _find_device(device: torch.device | str | None) -> torch.device | str:
    """The device, or that which None stands for, once it is known that tensors can lie on it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("tensors there hold no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each for devices of some kinds
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({reason}): give cpu, or cuda where there is a GPU"
        ) from None
    return device
