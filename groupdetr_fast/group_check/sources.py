"""What may be checked, and how it is found: modules, functions that build one, and models of three packages."""

import copy
import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..build import build_criterion
from ..models.checkpoints import CheckpointHeader, build_detector, load_checkpoint, read_header
from ..models.detector import Detector
from ..models.registry import build_model, model_config, model_names
from ..targets import PackedTargets
from ..transformers_detector.families import model_type_in, of_transformers, require_transformers
from .quiet import own_chance
from .subject import Inputs, Subject, in_short, make_images, make_targets, other_targets, subject_of_module

__all__ = ["find_subject"]

_IMAGE_SIZE = (96, 128)
_SEED = 0  # of weights and batches
_DETECTOR = ("groupdetr_fast.detector", "Detector")  # which needs the extra train, as the check does not


def find_subject(
    source: Any,
    inputs: Any,
    loss: Callable[[Any], Any] | None,
    *,
    batch_size: int,
    image_size: tuple[int, int] | None,
) -> Subject:
    """The model that is meant, with batches that fit it; see ``check_groups``."""
    with own_chance(_SEED):
        name = str(source if isinstance(source, str | Path) else getattr(source, "__name__", "the function"))
        if isinstance(source, str | Path):
            source = _load(source)
        if not isinstance(source, nn.Module) and callable(source):
            source, inputs, loss = _build(source, inputs, loss, name)
        if _is_of(source, *_DETECTOR):
            source = source.in_training()
        if _is_of(source, "groupdetr_fast.transformers_detector.detector", "TransformersDetector"):
            source = _with_loss(source)
        if _is_of(source, "rfdetr.config", "ModelConfig"):
            return _subject_of_rfdetr(source, batch_size, image_size)
        if not isinstance(source, nn.Module):
            raise TypeError(
                "model must be a module, a gd.Detector, a function that builds one, the name of a model or of such a "
                f"function, a checkpoint or a directory of transformers, got a {type(source).__name__}"
            )
        if inputs is None and isinstance(source, Detector):
            return _subject_of_detector(source, loss, batch_size, image_size or _IMAGE_SIZE)
        if inputs is None and _is_of(source, "transformers.modeling_utils", "PreTrainedModel"):
            return _subject_of_transformers(source, loss, batch_size, image_size)
        return subject_of_module(source, inputs, loss, batch_size=batch_size, image_size=image_size or _IMAGE_SIZE)


def _load(source: str | Path) -> Any:
    """What a name stands for: a module, a function, or a configuration of rfdetr."""
    text, path = str(source), Path(source)
    if text in model_names():
        default = model_config(text)
        return build_model(text, num_classes=default.num_classes, num_groups=default.num_groups)
    if of_transformers(text):
        return _load_detector(text)
    if path.exists():
        return _load_files(path)
    if ":" in text:
        return _find_function(text)
    if text.startswith("RFDETR"):
        return _find_rfdetr(text)
    raise ValueError(
        f"there is no model {text!r}: give one of {', '.join(model_names())}, a checkpoint, a directory of "
        'transformers, a name of rfdetr such as "RFDETRNano", or "package.module:function"'
    )


def _load_files(path: Path) -> nn.Module:
    """The model of a checkpoint of this package, or of a directory of transformers."""
    try:
        header = read_header(path)
    except (FileNotFoundError, ValueError):
        if model_type_in(path) is None:
            raise
        header = CheckpointHeader()
    if header.transformers:
        return _load_detector(path)
    if model_type_in(path) is not None:
        return _load_transformers(path)
    if header.model is None:
        raise ValueError(f"{path} does not say which model of this package it is of")
    model = build_detector(header)
    load_checkpoint(model, path)
    return model


def _load_detector(checkpoint: str | Path) -> nn.Module:
    """A detector of transformers: as ``transformers:DIR_OR_ID`` has it, or as a training of this package does."""
    require_transformers()
    from ..transformers_detector.build import load_detector

    return load_detector(checkpoint)[0]


def _with_loss(detector: Any) -> nn.Module:
    """A copy of the model of transformers in a detector, with the loss that its training computes from its outputs."""
    model: nn.Module = copy.deepcopy(detector.model)
    model.loss_function = detector.loss_function
    return model


def _find_function(text: str) -> Callable[[], Any]:
    module_name, _, name = text.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no function {text}: {error}") from error
    if not callable(found):
        raise ValueError(f"{text} must be a function that builds a model, got a {type(found).__name__}")
    return found


def _build(
    function: Callable[[], Any], inputs: Any, loss: Callable[[Any], Any] | None, name: str
) -> tuple[Any, Any, Callable[[Any], Any] | None]:
    """The module that a function builds, with the inputs and the loss that it gives, where it does."""
    try:
        built = function()
    except Exception as error:  # of foreign code
        raise ValueError(f"{name} builds no model: {in_short(error)}") from error
    if isinstance(built, tuple) and 1 <= len(built) <= 3:
        built, its_inputs, its_loss = (*built, None, None)[:3]
        inputs, loss = inputs if its_inputs is None else its_inputs, its_loss or loss
    known = isinstance(built, nn.Module) or _is_of(built, *_DETECTOR) or _is_of(built, "rfdetr.config", "ModelConfig")
    if not known:
        raise ValueError(
            f"{name} must return a module, (module, inputs) or (module, inputs, loss), got a {type(built).__name__}"
        )
    return built, inputs, loss


def _is_of(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a package that need not be installed."""
    return any(cls.__module__ == module and cls.__name__ == name for cls in type(value).__mro__)


def _subject_of_detector(
    model: Detector, loss: Callable[[Any], Any] | None, batch_size: int, image_size: tuple[int, int]
) -> Subject:
    """A detector of this package, whose groups are an argument."""
    config = model.config
    images = make_images(batch_size, image_size, model)
    masks = torch.zeros(batch_size, *image_size, dtype=torch.bool, device=images.device)
    masks[-1, :, image_size[1] * 3 // 4 :] = True
    targets = make_targets(batch_size, config.num_classes, images.device)
    if config.predicts_masks:
        for target in targets:
            target["masks"] = torch.rand(len(target["labels"]), *image_size, device=images.device) > 0.5
    packed = PackedTargets.from_list(targets)
    criterion = build_criterion(model)

    def inputs(size: int, targets: PackedTargets) -> Inputs:
        training = {"targets": targets, "num_groups": config.num_groups}
        return Inputs((images[:size], masks[:size]), training=training)

    return Subject(
        name=type(model).__name__,
        model=model,
        inputs=inputs(batch_size, packed),
        single=inputs(1, PackedTargets.from_list(targets[:1])),
        retargeted=inputs(batch_size, PackedTargets.from_list(other_targets(targets))),
        loss=loss or (lambda outputs: criterion(outputs, packed)["loss"]),
    )


def _square(num_queries: int, patch_size: int, num_windows: int) -> tuple[int, int]:
    """The size of a small square image with a token for every query of a group, as queries are selected from them."""
    step = patch_size * num_windows
    side = step * math.ceil((math.isqrt(max(num_queries - 1, 0)) + 1) * patch_size / step)
    return side, side


def _load_transformers(path: Path) -> nn.Module:
    """The model of a directory, with random weights if there is a config.json alone."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(f"{path} is of transformers, which is not installed: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        name = next(iter(config.architectures or ()), None)
        cls = getattr(transformers, str(name), None) or transformers.AutoModelForObjectDetection
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            return cls.from_pretrained(path, local_files_only=True)
        build = getattr(cls, "from_config", None) or cls._from_config
        return build(config)
    except Exception as error:  # of foreign code
        raise ValueError(f"transformers cannot load {path}: {in_short(error)}") from error


def _subject_of_transformers(
    model: Any, loss: Callable[[Any], Any] | None, batch_size: int, image_size: tuple[int, int] | None
) -> Subject:
    config = model.config
    if image_size is None:
        backbone = getattr(config, "backbone_config", None)
        patch, windows = getattr(backbone, "patch_size", None), getattr(backbone, "num_windows", 1)
        image_size = _square(config.num_queries, patch, windows) if isinstance(patch, int) else (160, 160)
    images = make_images(batch_size, image_size, model)
    targets = make_targets(batch_size, config.num_labels, images.device, labels="class_labels")

    def inputs(size: int, targets: list[dict[str, torch.Tensor]]) -> Inputs:
        return Inputs(kwargs={"pixel_values": images[:size], "labels": targets})

    subject = Subject(
        name=type(model).__name__,
        model=model,
        inputs=inputs(batch_size, targets),
        single=inputs(1, targets[:1]),
        retargeted=inputs(batch_size, other_targets(targets)),
        loss=loss,
    )
    if getattr(config, "group_detr", 1) > 1:
        subject.one_group_loss = partial(_loss_with_one_group, subject)
    return subject


def _loss_with_one_group(subject: Subject) -> float:
    """The loss of evaluation mode with ``config.group_detr`` = 1, which is restored."""
    config: Any = subject.model.config
    groups = config.group_detr
    config.group_detr = 1
    try:
        subject.model.eval()
        with torch.no_grad():
            return float(subject.forward(subject.inputs).loss)
    finally:
        config.group_detr = groups


def _find_rfdetr(name: str) -> Any:
    """A configuration of rfdetr by its name, or by that of the class that it is of."""
    try:
        config = importlib.import_module("rfdetr.config")
    except ImportError as error:
        raise ValueError(f"{name} is a name of rfdetr, which cannot be imported: {error}") from error
    cls = getattr(config, name if name.endswith("Config") else f"{name}Config", None)
    if cls is None:
        raise ValueError(f"rfdetr has no configuration {name}")
    return cls(device="cpu")


def _subject_of_rfdetr(config: Any, batch_size: int, image_size: tuple[int, int] | None) -> Subject:
    """A model of rfdetr with random weights, and its criterion for classes and boxes."""
    lwdetr, defaults = importlib.import_module("rfdetr.models.lwdetr"), importlib.import_module("rfdetr.config")
    train = defaults.TrainConfig(dataset_dir=".", output_dir=".")
    try:
        model = lwdetr.build_model_from_config(config, train)
        criterion, _ = lwdetr.build_criterion_from_config(config, train)
    except Exception as error:  # of foreign code
        raise ValueError(f"rfdetr cannot build a model of {type(config).__name__}: {in_short(error)}") from error
    if image_size is None:
        image_size = _square(config.num_queries, config.patch_size, config.num_windows)
    images = make_images(batch_size, image_size, model)
    targets = make_targets(batch_size, config.num_classes, images.device)
    criterion.losses = [name for name in criterion.losses if name in ("labels", "boxes")]

    def loss(outputs: Any) -> dict[str, Any]:
        criterion.train(model.training)
        losses, weights = criterion(outputs, targets), criterion.weight_dict
        return {name: value * weights[name] for name, value in losses.items() if name in weights}

    return Subject(
        name=f"{type(model).__name__} of rfdetr ({type(config).__name__})",
        model=model,
        inputs=Inputs((images,)),
        single=Inputs((images[:1],)),
        loss=loss,
    )
