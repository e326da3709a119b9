"""What a file of this package says of its model beside the weights, and the detector that follows from it.

A header may be anybody's: what is read from a file is checked, value by value, before a model is built by it.
"""

import json
import math
import re
import reprlib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ..detector import Detector
from ..registry import build_model, model_config, model_names

__all__ = ["MOST_PARAMETERS", "CheckpointHeader", "build_detector"]

# Far beyond every detector that is trained; below what would build for minutes or take all memory.
_LARGEST = {"encoder_layers": 100, "decoder_layers": 100, "num_levels": 16, "backbone_levels": 16, "num_points": 64}
_LARGEST_SETTING = 100_000  # of the others; a class for every label of ``CocoDataset``
_LARGEST_ID = 2**63 - 1
MOST_PARAMETERS = 10**9  # of a model that is built as a file says; of this package's detectors, beside the backbone
_BACKBONE = re.compile(r"conv:\d+(-\d+){0,7}|(timm:)?[\w.-]{1,100}", re.ASCII)
_WIDEST = 2048  # of a conv: backbone
_LONGEST_SIDE = 10_000  # pixels of an image in evaluation
_LONGEST_TEXT = 1000  # characters of a setting
# Of the settings of transformers' models.
_DEEPEST = 8
_LONGEST_LIST = 1000
_COUNTED = ("layers", "depths", "blocks", "group", "stage_num")  # parts of names of what modules are built for
_LARGEST_COUNT = 1000


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """The header of a weights file, from which its model can be built and used without the training.

    Every field has a default, since older files lack some of them, and files of other code lack all.

    Attributes:
        model: name of the detector; None if the file does not say.
        model_config: settings of the detector, by name.
        categories: COCO's entries, ascending by id.
        labels: "contiguous" or "category_id", what the class numbers of the detector are.
        evaluation: sizes and normalisation of images in evaluation, settings of ``AugmentationConfig`` by name.
        transformers: of a model of transformers, its configuration and that of its image processor, as transformers
            writes them; empty for the detectors of this package.
        epoch: finished epochs.
        AP: of the weights, in [0, 1]; None where they were not evaluated.
    """

    model: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    categories: list[dict[str, Any]] = field(default_factory=list)
    labels: Literal["contiguous", "category_id"] = "category_id"
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    transformers: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    AP: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The header as an object of json, without what it does not say."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CheckpointHeader":
        """The header that :meth:`to_json` made into ``content``; keys that are no fields are ignored.

        Raises:
            ValueError: for a value of another type than a header has, or beyond all bounds.
        """
        if not isinstance(content, dict):
            raise ValueError(f"the header must be an object of json, got {reprlib.repr(content)}")
        header = cls(**{each.name: content[each.name] for each in fields(cls) if each.name in content})
        _check(header)
        return header


def build_detector(header: CheckpointHeader, **changes: Any) -> Detector:
    """The detector of a checkpoint, with random weights everywhere, for those of the checkpoint to replace.

    Args:
        header: of the checkpoint. Settings that it does not have are those of the detector by default.
        **changes: settings that differ.

    Raises:
        ValueError: as :func:`build_model`, and if the header does not say which detector it is of.
    """
    if header.model is None:
        raise ValueError("the checkpoint does not say which detector it is of")
    default = model_config(header.model)
    settings = {"num_classes": default.num_classes, "num_groups": default.num_groups, **header.model_config, **changes}
    return build_model(header.model, **{**settings, "backbone_weights": None})


def _check(header: CheckpointHeader) -> None:
    _require("model", header.model, "a name or null", header.model is None or isinstance(header.model, str))
    _require("labels", header.labels, '"contiguous" or "category_id"', header.labels in ("contiguous", "category_id"))
    _require("epoch", header.epoch, "a whole number or null", header.epoch is None or _is_whole(header.epoch, 0))
    _require("AP", header.AP, "a number or null", header.AP is None or _is_number(header.AP))
    for name in ("model_config", "evaluation", "transformers"):
        value = getattr(header, name)
        _require(name, value, "an object", isinstance(value, dict))
    _check_categories(header)
    _check_evaluation(header)
    _check_model(header)
    _check_foreign(header.transformers, "transformers", depth=0)


def _check_categories(header: CheckpointHeader) -> None:
    least, largest = -_LARGEST_ID, _LARGEST_ID
    if header.labels == "category_id":  # a class for every number up to the largest id
        least, largest = 0, _LARGEST_SETTING - 1
    _require("categories", header.categories, "a list", isinstance(header.categories, list))
    for index, category in enumerate(header.categories):
        _require(f"categories[{index}]", category, "an object", isinstance(category, dict))
        number, name = category.get("id"), category.get("name")
        expected = f"a whole number from {least} to {largest}"
        _require(f"categories[{index}].id", number, expected, _is_whole(number, least, largest))
        _require(f"categories[{index}].name", name, "a text", isinstance(name, str))


def _check_evaluation(header: CheckpointHeader) -> None:
    for name, value in header.evaluation.items():
        key = f"evaluation.{name}"
        if name in ("eval_short_side", "eval_max_size"):
            fits = _is_whole(value, 1, _LONGEST_SIDE) or (value is None and name == "eval_max_size")
            _require(key, value, f"a whole number from 1 to {_LONGEST_SIDE}", fits)
        elif name == "square":
            _require(key, value, "true or false", isinstance(value, bool))
        elif name in ("image_mean", "image_std"):
            fits = isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))
            _require(key, value, "three numbers", fits)
        else:
            raise ValueError(f"the header has the unknown setting {reprlib.repr(key)}")


def _check_model(header: CheckpointHeader) -> None:
    known = header.model if header.model in model_names() else None
    hints = {} if known is None else get_type_hints(type(model_config(known)))
    for name, value in header.model_config.items():
        largest = _LARGEST.get(name, _LARGEST_SETTING)
        # For a setting that is not known what any has; whoever builds the detector refuses it.
        options = _options(hints.get(name, int | float | bool | str | None))
        expected = f"{' or '.join(map(_in_words, options))} (numbers at most {largest})"
        _require(f"model_config.{name}", value, expected, any(_fits(value, option, largest) for option in options))
    backbone = header.model_config.get("backbone", "resnet50")
    _require("model_config.backbone", backbone, "the name of a backbone", _is_backbone(backbone))
    if known is not None:
        count = _count_parameters(known, json.dumps(header.model_config))
        if count > MOST_PARAMETERS:
            raise ValueError(
                f"the header is of a model with {count} parameters, and at most {MOST_PARAMETERS} are built"
            )


def _check_foreign(value: Any, key: str, depth: int) -> None:
    """Check settings whose names are not known here: that they are plain, and of no size that would take forever."""
    _require(key, value, f"nested at most {_DEEPEST} times", depth <= _DEEPEST)
    if isinstance(value, dict):
        _require(key, len(value), f"at most {_LARGEST_SETTING} entries", len(value) <= _LARGEST_SETTING)
        for name, each in value.items():
            _check_foreign(each, f"{key}.{name}", depth + 1)
    elif isinstance(value, list):
        _require(key, len(value), f"at most {_LONGEST_LIST} entries", len(value) <= _LONGEST_LIST)
        for each in value:
            _check_foreign(each, key, depth + 1)
    elif isinstance(value, str):
        _require(key, value, f"at most {_LONGEST_TEXT} characters", len(value) <= _LONGEST_TEXT)
    elif value is not None and not isinstance(value, bool):
        counted = any(word in key.rpartition(".")[2] for word in _COUNTED)
        largest = _LARGEST_COUNT if counted else _LARGEST_SETTING
        _require(key, value, f"a number of at most {largest}", _is_number(value) and abs(value) <= largest)


@lru_cache
def _count_parameters(model: str, settings: str) -> int:
    """Parameters beside the backbone of a detector, of which nothing is allocated; 0 if there is no such detector."""
    known = {each.name for each in fields(model_config(model))}
    own = {name: value for name, value in json.loads(settings).items() if name in known}
    small = {"backbone": "conv:4-4-4-4", "backbone_weights": None, "backbone_stages": None, "dilation": False}
    try:
        with torch.device("meta"):
            detector = build_model(model, **{"num_classes": 1, "num_groups": 1, **own, **small})
    except ValueError:  # told when the detector itself is built
        return 0
    return sum(parameter.numel() for parameter in detector.parameters())


def _require(name: str, value: Any, expected: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name[:100]!r} in the header must be {expected}, got {reprlib.repr(value)}")


def _fits(value: Any, option: Any, largest: int) -> bool:
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    if option is int:
        return _is_whole(value, 0, largest)
    if option is float:
        return _is_number(value) and abs(value) <= largest
    return type(value) is option and (option is not str or len(value) <= _LONGEST_TEXT)


def _is_whole(value: Any, least: int, largest: int = _LARGEST_ID) -> bool:
    return type(value) is int and least <= value <= largest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST_ID and math.isfinite(value)


def _is_backbone(value: Any) -> bool:
    if not (isinstance(value, str) and _BACKBONE.fullmatch(value)):
        return False
    return not value.startswith("conv:") or all(1 <= int(width) <= _WIDEST for width in value[5:].split("-"))


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _in_words(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names[option]
