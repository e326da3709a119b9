"""Building a detector of transformers: from a directory, the hub, or a checkpoint of this package."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForObjectDetection, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..models.checkpoints import CheckpointHeader, CheckpointMismatch, read_header
from ..models.checkpoints.header import MOST_PARAMETERS
from ..models.checkpoints.read import find_weights, read_checkpoint
from .detector import TransformersDetector
from .families import PREFIX, of_transformers, place_of
from .hub import explained
from .source import ModelSource, read_source

__all__ = ["load_detector", "load_pretrained"]

logger = logging.getLogger(__name__)

# Settings of a configuration that could load code or weights from elsewhere; a header may be anybody's.
_LEFT_OUT = re.compile(
    r"_?attn_implementation(_internal)?|_?experts_implementation|auto_map|quantization_config|use_kernels"
)
_BACKBONE_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)


def load_detector(
    checkpoint: str | Path,
    *,
    num_classes: int | None = None,
    num_groups: int | None = None,
    accelerate_kernels: bool = True,
    weights: bool = True,
) -> tuple[TransformersDetector, int]:
    """The detector of a checkpoint, of this package or as transformers has saved it, with its weights.

    Args:
        checkpoint: file or folder; or ``transformers:DIR_OR_ID``.
        num_classes: C; a model with another number gets a new class head, which the log says, and keeps everything
            else. None for the checkpoint's own.
        num_groups: K; None for that of the checkpoint. 1, with which detectors are evaluated, leaves the groups of
            models that have some of their own.
        accelerate_kernels: see :class:`TransformersDetector`.
        weights: whether to read the weights of a checkpoint of this package; without them they are random.

    Returns:
        The detector, and how many of its groups have queries of the checkpoint.

    Raises:
        CheckpointMismatch: if the weights are those of another model than the checkpoint describes.
        FileNotFoundError: if there is nothing at the path.
        ValueError: as :func:`load_pretrained`, and if the header does not describe a model that can be built.
    """
    header = CheckpointHeader() if of_transformers(checkpoint) else read_header(checkpoint)
    if header.transformers:
        detector = _build_from_header(header, num_groups, accelerate_kernels)
        if weights:
            _load_weights(detector, checkpoint)
        if num_classes not in (None, detector.config.num_classes):
            detector = _with_new_class_head(detector, header, num_classes, accelerate_kernels)
        return detector, int(header.model_config.get("num_groups", 1))
    name = str(checkpoint) if of_transformers(checkpoint) else f"{PREFIX}{find_weights(checkpoint)}"
    groups = None if num_groups == 1 else num_groups
    return load_pretrained(name, num_classes=num_classes, num_groups=groups, accelerate_kernels=accelerate_kernels), 1


def load_pretrained(
    name: str, *, num_classes: int | None = None, num_groups: int | None = None, accelerate_kernels: bool = True
) -> TransformersDetector:
    """The detector of a directory or of the hub, with its weights.

    Args:
        name: ``transformers:DIR_OR_ID``.
        num_classes: C; a model with another number gets a new class head, which the log says. None for the model's own.
        num_groups: K; None for the model's own.
        accelerate_kernels: see :class:`TransformersDetector`.

    Raises:
        ValueError: if the model cannot be loaded, lacks weights, or cannot have so many groups.
    """
    source = read_source(name)
    own = len(source.class_names)
    settings: dict[str, Any] = {} if num_classes in (None, own) else {"num_labels": num_classes}
    if "anchor_image_size" in source.config:
        settings["anchor_image_size"] = None  # else evaluation would have the anchors of one size of image
    with explained(place_of(name)), _quiet():
        model, report = AutoModelForObjectDetection.from_pretrained(
            place_of(name),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=source.cache_alone,
            **settings,
        )
        _freeze_as_built(model)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{place_of(name)} lacks weights of its {type(model).__name__}, such as {missing[0]}")
    if settings.get("num_labels"):
        _say_new_class_head(name, model.config.num_labels, own)
    elif report["mismatched_keys"]:
        raise ValueError(f"weights in {place_of(name)} do not have the shapes that its config.json says")
    groups = source.num_groups if num_groups is None else num_groups
    detector = TransformersDetector(model, source.processor, num_groups=groups, accelerate_kernels=accelerate_kernels)
    if not any(detector.is_backbone(key) and weight.requires_grad for key, weight in detector.named_parameters()):
        logger.warning("%s: transformers freezes the whole backbone of this model, which stays as it is", name)
    return detector


def _build_from_header(
    header: CheckpointHeader, num_groups: int | None, accelerate_kernels: bool, num_classes: int | None = None
) -> TransformersDetector:
    """The detector that a checkpoint describes, with random weights. Models with groups of their own keep them.

    ``num_classes`` is None for those of the checkpoint.
    """
    source = ModelSource.of_header(header)
    config = _configuration(source)
    if num_classes is not None:
        config.num_labels = num_classes
    with explained(source.name), _quiet():
        with torch.device("meta"):
            count = sum(weight.numel() for weight in AutoModelForObjectDetection.from_config(config).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"it has {count} parameters, and at most {MOST_PARAMETERS} are built")
        model = AutoModelForObjectDetection.from_config(config, dtype=torch.float32)
    groups = int(header.model_config.get("num_groups", 1)) if num_groups is None else num_groups
    if source.family.groups == "own":
        groups = source.num_groups
    return TransformersDetector(model, source.processor, num_groups=groups, accelerate_kernels=accelerate_kernels)


def _load_weights(detector: TransformersDetector, checkpoint: str | Path) -> None:
    """Load a checkpoint of this package into the detector that its header describes."""
    state = read_checkpoint(checkpoint).state
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointMismatch(
            f"checkpoint {checkpoint} does not fit the model that it describes: {reason}"
        ) from None


def _with_new_class_head(
    trained: TransformersDetector, header: CheckpointHeader, num_classes: int, accelerate_kernels: bool
) -> TransformersDetector:
    """The detector with all weights of ``trained`` but those whose shapes follow the number of classes."""
    detector = _build_from_header(header, trained.config.num_groups, accelerate_kernels, num_classes)
    state = detector.state_dict()
    kept = {name: weight for name, weight in trained.state_dict().items() if weight.shape == state[name].shape}
    detector.load_state_dict(kept, strict=False)
    _say_new_class_head(str(header.model), num_classes, trained.config.num_classes)
    return detector


def _say_new_class_head(name: str, now: int, before: int) -> None:
    logger.info("%s: a new class head for %d classes, in place of one for %d", name, now, before)


def _freeze_as_built(model: PreTrainedModel) -> None:
    """Freeze what the model's own code freezes, such as D-FINE's ``reg_scale``: loading weights makes all trainable."""
    with torch.device("meta"):
        built = dict(AutoModelForObjectDetection.from_config(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(built[name].requires_grad)


def _configuration(source: ModelSource) -> PretrainedConfig:
    """The configuration in a header, without what would load anything from elsewhere."""
    plain = _harmless(source.config)
    with explained(source.name):
        return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)


def _harmless(value: Any) -> Any:
    if isinstance(value, list):
        return [_harmless(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for name, each in value.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        if name in ("use_pretrained_backbone", "use_pretrained"):
            each = False
        if name == "backbone" and each is not None and not (isinstance(each, str) and _BACKBONE_NAME.fullmatch(each)):
            raise ValueError("the checkpoint's backbone must be the name of a network of timm")
        kept[name] = _harmless(each)
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers does not write a table of what it loaded, of which the log here has one line."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
