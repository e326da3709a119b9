"""What is known of a model of transformers before it is built: its configuration and how it wants its images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ..data import AugmentationConfig
from ..data.transforms import EVAL_SETTINGS
from ..models.checkpoints import CheckpointHeader
from .families import FAMILIES, Family, place_of, require_transformers
from .hub import CONFIG_FILE, explained, without_hub

__all__ = ["ModelSource", "read_source"]

PROCESSOR_FILE = "preprocessor_config.json"
_REFERENCE_SIDE = 800  # to which the default sizes of AugmentationConfig belong


@dataclass(frozen=True)
class ModelSource:
    """A model of transformers, as its files describe it.

    Attributes:
        name: ``transformers:DIR_OR_ID``.
        config: content of ``config.json``, with all defaults.
        processor: content of ``preprocessor_config.json``, or the defaults of the architecture.
        cache_alone: whether its files are to come from the hub's cache; see :func:`hub.without_hub`.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    cache_alone: bool = False

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

    place = place_of(name)
    with explained(place):
        local = without_hub(place)
        found = AutoConfig.from_pretrained(place, local_files_only=local)
        config = json.loads(found.to_json_string(use_diff=False))
    family = _family(config, name)
    with explained(place):
        processor = _processor(place, local) or _default_processor(family)
    return ModelSource(name, config, processor, local)


def _family(config: Mapping[str, Any], name: str) -> Family:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(f"{name} is a model of type {kind!r}; those that are trained here are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _processor(place: str, local: bool) -> dict[str, Any] | None:
    """What a model's files say of its images; None if it has none that does.

    Raises:
        ConnectionError: if the hub does not say whether there is one, for which defaults would be a guess.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(place, local_files_only=local)
    except OSError:
        if not Path(place).exists() and try_to_load_from_cache(place, PROCESSOR_FILE) is None:
            reason = f"the hub does not say whether it has a {PROCESSOR_FILE}"
            config = try_to_load_from_cache(place, CONFIG_FILE)
            if isinstance(config, str):  # a download of all files leaves no mark of those that the hub lacks
                reason += f"; if all of its files are in the cache, give transformers:{Path(config).parent}"
            raise ConnectionError(reason) from None
        return None
    return dict(processor)


def _default_processor(family: Family) -> dict[str, Any]:
    import transformers

    processor = getattr(transformers, family.processor)()
    return dict(json.loads(processor.to_json_string()))


def _size(processor: Mapping[str, Any]) -> tuple[int, int | None, bool]:
    """Short side, limit on the long side, and whether images become squares."""
    size = processor.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    height, width = size.get("height"), size.get("width")
    if height and width:
        return min(height, width), (None if height == width else max(height, width)), height == width
    default = AugmentationConfig()
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    return short or default.eval_short_side, (long if short else default.eval_max_size), False
