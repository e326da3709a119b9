"""What is known of a model of transformers before it is built: its configuration and how it wants its images."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..data import AugmentationConfig
from ..data.transforms import EVAL_SETTINGS
from ..models.checkpoints import CheckpointHeader
from .families import FAMILIES, Family, place_of, require_transformers

__all__ = ["ModelSource", "explained", "read_source"]

_REFERENCE_SIDE = 800  # to which the default sizes of AugmentationConfig belong


@dataclass(frozen=True)
class ModelSource:
    """A model of transformers, as its files describe it.

    Attributes:
        name: ``transformers:DIR_OR_ID``.
        config: content of ``config.json``, with all defaults.
        processor: content of ``preprocessor_config.json``, or the defaults of the architecture.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]

    @classmethod
    def of_header(cls, header: CheckpointHeader) -> "ModelSource":
        """What a checkpoint of this package says of a model of transformers.

        Raises:
            ValueError: if it is of no model of transformers, or of one that is not known here.
        """
        described = header.transformers
        config, processor = described.get("config"), described.get("processor")
        if not isinstance(config, dict) or not isinstance(processor, dict):
            raise ValueError("the checkpoint does not describe a model of transformers")
        _family(config, str(header.model))
        return cls(str(header.model), config, processor)

    @property
    def family(self) -> Family:
        """What is peculiar to the architecture."""
        return _family(self.config, self.name)

    @property
    def num_groups(self) -> int:
        """Groups that the model has of its own; 1 for a model without."""
        return int(self.config["group_detr"]) if self.family.groups == "own" else 1

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the classes by number."""
        return {int(number): str(name) for number, name in self.config["id2label"].items()}

    def augmentation(self) -> AugmentationConfig:
        """Sizes and normalisation as the model's processor has them, for training and evaluation.

        Models for squares get squares of one size. For the others the sizes of DETR's augmentation, which belong to
        short sides up to 800 pixels, are reduced or enlarged with the processor's short side.
        """
        short, long, square = _size(self.processor)
        factor = short / _REFERENCE_SIDE
        default = AugmentationConfig()
        sides = tuple(dict.fromkeys(max(8, round(side * factor)) for side in default.short_sides))
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if self.processor.get("do_normalize"):
            mean, std = (tuple(self.processor[name]) for name in ("image_mean", "image_std"))
        return AugmentationConfig(
            square=square,
            short_sides=(short,) if square else sides,
            max_size=long,
            crop_short_sides=tuple(max(8, round(side * factor)) for side in default.crop_short_sides),
            crop_min=max(8, round(default.crop_min * factor)),
            crop_max=max(8, round(default.crop_max * factor)),
            eval_short_side=short,
            eval_max_size=long,
            image_mean=mean,
            image_std=std,
        )

    def header(self) -> CheckpointHeader:
        """The model as a checkpoint of this package would describe it; labels are the model's own numbers."""
        augmentation = self.augmentation()
        return CheckpointHeader(
            model=self.name,
            model_config={"num_classes": len(self.class_names), "num_groups": self.num_groups},
            categories=[{"id": number, "name": name} for number, name in sorted(self.class_names.items())],
            evaluation={name: getattr(augmentation, name) for name in EVAL_SETTINGS},
            transformers={"config": self.config, "processor": self.processor},
        )


def read_source(name: str) -> ModelSource:
    """Read what a directory, or a model on the hub, says of itself; of the hub, small files alone are loaded.

    Args:
        name: ``transformers:DIR_OR_ID``.

    Raises:
        ValueError: if nothing can be read there, the model is no detector that is known here, or transformers is not
            installed; one sentence.
    """
    require_transformers()
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    place = place_of(name)
    with explained(place):
        config = json.loads(AutoConfig.from_pretrained(place).to_json_string(use_diff=False))
    family = _family(config, name)
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:  # there is none
        processor = _default_processor(family)
    return ModelSource(name, config, processor)


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Inside, what transformers raises for a model that it cannot load becomes one sentence.

    Raises:
        ValueError: instead of what transformers and the hub's client raise.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # of the client's network library, among others, which is an implementation detail
        reason = " ".join(str(error).split("\n")[0].split()).removesuffix(".") or type(error).__name__
        raise ValueError(
            f"transformers cannot load {place!r} ({reason}): give a directory with config.json and weights, or the id "
            "of a model on the hub, with network"
        ) from None


def _family(config: Mapping[str, Any], name: str) -> Family:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(f"{name} is a model of type {kind!r}; those that are trained here are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _default_processor(family: Family) -> dict[str, Any]:
    import transformers

    processor = getattr(transformers, family.processor)()
    return dict(json.loads(processor.to_json_string()))


def _size(processor: Mapping[str, Any]) -> tuple[int, int | None, bool]:
    """Short side, limit of the long side, and whether images become squares."""
    size = processor.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    height, width = size.get("height"), size.get("width")
    if height and width:
        return min(height, width), (None if height == width else max(height, width)), height == width
    default = AugmentationConfig()
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    return short or default.eval_short_side, (long if short else default.eval_max_size), False
