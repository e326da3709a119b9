"""From a checkpoint and images to named detections, without a data set (extra ``train``)."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from .data import AugmentationConfig, collate, eval_transforms
from .data.images import IMAGE_LIKE, ChannelOrder, ImageLike, as_rgb
from .data.transforms import EVAL_SETTINGS
from .files import read_json
from .models import load_checkpoint, postprocess
from .models.checkpoints import CheckpointHeader, build_detector, read_header
from .models.detector import Detector, in_eval_mode
from .models.postprocess import check_selection
from .transformers_detector.families import FAMILIES, PREFIX, of_transformers, require_transformers

if TYPE_CHECKING:
    from .transformers_detector.detector import TransformersDetector

__all__ = [
    "EVAL_SETTINGS",
    "InferenceSettings",
    "class_table",
    "describe_model",
    "load_model",
    "predict",
    "settings_of",
]


def class_table(categories: Sequence[Mapping[str, Any]], labels: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids of the classes, by label.

    Args:
        categories: COCO's entries, ascending by id.
        labels: "contiguous" or "category_id", see ``CocoDataset``; in the second mode, labels that are the id of no
            category have their number as name.
    """
    names = {category["id"]: str(category["name"]) for category in categories}
    ids = tuple(names) if labels == "contiguous" else tuple(range(max(names, default=-1) + 1))
    return tuple(names.get(category_id, str(category_id)) for category_id in ids), ids


@dataclass(frozen=True)
class InferenceSettings:
    """What a checkpoint says beside its weights.

    Attributes:
        class_names: of the labels; a label beyond them is named by its number.
        category_ids: COCO's category id of each label; None where labels are category ids.
        augmentation: of which the sizes in evaluation, the mean and the deviation count.
    """

    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] | None = None
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    @classmethod
    def from_header(cls, header: CheckpointHeader) -> "InferenceSettings":
        """The settings in the header of a checkpoint of this package; the defaults where it has none."""
        described = {name: _as_tuple(value) for name, value in header.evaluation.items()}
        settings = cls(augmentation=AugmentationConfig(**described))
        if header.categories:
            settings = settings.with_categories(header.categories, header.labels)
        return settings

    def with_categories(self, categories: Sequence[Mapping[str, Any]], labels: str) -> "InferenceSettings":
        """The same settings with the classes of another table; see :func:`class_table`."""
        names, ids = class_table(categories, labels)
        return replace(self, class_names=names, category_ids=ids)

    def with_sizes(self, **settings: Any) -> "InferenceSettings":
        """The same settings with some of :data:`EVAL_SETTINGS` replaced; None keeps what there is."""
        given = {name: value for name, value in settings.items() if value is not None}
        return replace(self, augmentation=replace(self.augmentation, **given))

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


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
    if (model is None and header.model is None and _holds_transformers(Path(checkpoint))) or of_transformers(model):
        return _describe_transformers(f"{PREFIX}{checkpoint}")
    if model and model != header.model:
        header = replace(header, model=model, model_config={})
    if header.model is None:
        raise ValueError(
            f"checkpoint {checkpoint} does not say which detector it is of: pass --model (model=... in Python)"
        )
    return header


def _describe_transformers(name: str) -> CheckpointHeader:
    from .transformers_detector.source import read_source

    return read_source(name).header()


def _holds_transformers(folder: Path) -> bool:
    """Whether a folder is a model directory of transformers, of a kind that is known here."""
    content = read_json(folder / "config.json") if folder.is_dir() else None
    return isinstance(content, dict) and content.get("model_type") in FAMILIES


def load_model(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    num_groups: int = 1,
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
        device: None for a GPU if there is one.
        **settings: sizes of the detector, as in ``build_model``, for checkpoints of other sizes than the original ones
            that do not say so.

    Returns:
        The detector in eval mode. Its ``inference_settings`` are what :func:`predict` goes by.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the detector is not named, the checkpoint does not fit it, or the device is not there.
    """
    device = _find_device(device)
    header = describe_model(checkpoint, model)
    changes = settings if num_classes is None else {**settings, "num_classes": num_classes}
    detector: Detector | TransformersDetector
    if header.transformers:
        detector = _load_transformers(checkpoint, header, num_groups, changes)
    else:
        detector = build_detector(header, num_groups=num_groups, **changes)
        load_checkpoint(detector, checkpoint)
    cast(Any, detector).inference_settings = InferenceSettings.from_header(header)
    return detector.to(device).eval()


def _load_transformers(
    checkpoint: str | Path, header: CheckpointHeader, num_groups: int, changes: Mapping[str, Any]
) -> "TransformersDetector":
    require_transformers()
    from .transformers_detector.build import build_from_header, load_pretrained, load_weights

    if changes:
        raise ValueError(f"{next(iter(changes))} cannot be set for {header.model}: its own configuration has it")
    if of_transformers(checkpoint) or not read_header(checkpoint).transformers:  # as transformers has saved it
        return load_pretrained(str(header.model))
    detector = build_from_header(header, num_groups=num_groups)
    load_weights(detector, checkpoint)
    return detector


def _find_device(device: torch.device | str | None) -> torch.device | str:
    """The device, or that which None stands for, once it is known that tensors can lie on it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each for devices of some kinds
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({reason}): give cpu, or cuda where there is a GPU"
        ) from None
    return device


def settings_of(model: nn.Module) -> InferenceSettings:
    """What the checkpoint of a model said that :func:`load_model` made; the defaults for another model."""
    settings = getattr(model, "inference_settings", None)
    return settings if isinstance(settings, InferenceSettings) else InferenceSettings()


@torch.no_grad()
def predict(
    model: nn.Module,
    images: ImageLike | Iterable[ImageLike],
    *,
    score_threshold: float = 0.3,
    top_k: int = 100,
    batch_size: int = 4,
    channel_order: ChannelOrder = "rgb",
    settings: InferenceSettings | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Detect objects in images.

    The model runs in eval mode, and is afterwards as it was. Images are read one by one, and of each batch only the
    reduced ones are kept.

    Args:
        model: a detector, as :func:`load_model` or ``build_model`` make it, on any device.
        images: one image or several: paths, PIL images, arrays ``[H, W(, C)]`` or tensors ``[(C, )H, W]`` of uint8 or
            of floats in [0, 1]; grey, RGB or RGBA. Arrays and tensors must have their colours in this order, which is
            not that of ``cv2.imread``: see ``channel_order``. The EXIF orientation of files and PIL images is applied.
        score_threshold: detections with lower scores are left out.
        top_k: detections per image.
        batch_size: images at a time, padded to the largest of them.
        channel_order: "bgr" for arrays and tensors whose colours are blue, green, red, as OpenCV reads them.
        settings: names of the classes, sizes and normalisation; by default the model's ``inference_settings``, or those
            of :class:`InferenceSettings` for a model without.

    Returns:
        A dictionary for one image, a list of them for several, with tensors on the CPU: ``"scores" [k]``, descending;
        ``"labels" [k]`` int64; ``"class_names"``, a list of k strings; ``"boxes" [k, 4]`` xyxy in pixels of the image
        that was given, the right way up; of a model that predicts masks also ``"masks" [k, H, W]`` bool.

    Raises:
        DataError: for an image file that cannot be read.
        TypeError, ValueError: for anything else that is no image, for a ``batch_size`` or ``top_k`` below 1, a
            threshold outside [0, 1], and another ``channel_order``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_selection(top_k, score_threshold)
    if settings is None:
        settings = settings_of(model)
    single = isinstance(images, IMAGE_LIKE) and not (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4)
    transform = eval_transforms(settings.augmentation)
    device = next(model.parameters()).device
    remaining = cast(Iterable[ImageLike], [images] if single else images)
    detections: list[dict[str, Tensor]] = []
    with in_eval_mode(model):
        # One image after another, and by map, which keeps none: a large one is gone before the next is read.
        samples = map(partial(_sample, transform=transform, channel_order=channel_order), remaining)
        while part := list(itertools.islice(samples, batch_size)):
            batch = collate(part)
            moved = batch.to(device)
            output = model(moved.images, moved.masks)
            detections += postprocess(output, batch.original_sizes, top_k=top_k, score_threshold=score_threshold)
    named = [_named(detection, settings) for detection in detections]
    return named[0] if single else named


def _sample(image: ImageLike, transform: Any, channel_order: ChannelOrder) -> tuple[Tensor, dict[str, Any]]:
    """An image as ``CocoDataset`` gives them, without objects."""
    pixels = as_rgb(image, channel_order=channel_order)
    reduced, said = transform(tv_tensors.Image(pixels), {})
    target = {
        **said,
        "labels": torch.empty(0, dtype=torch.int64),
        "boxes": torch.empty(0, 4),
        "image_id": 0,
        "original_size": torch.tensor(pixels.shape[-2:]),
    }
    return reduced.as_subclass(Tensor), target


def _named(detection: dict[str, Tensor], settings: InferenceSettings) -> dict[str, Any]:
    detection = {name: value.cpu() for name, value in detection.items()}
    return {**detection, "class_names": [settings.name(label) for label in detection["labels"].tolist()]}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
