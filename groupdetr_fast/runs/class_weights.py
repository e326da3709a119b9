"""Weights of classes in the class loss, from the data or from a file."""

import logging
import reprlib
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..build import build_criterion
from ..data import CocoDataset
from ..data.rare_classes import balanced_weights
from ..spelling import did_you_mean
from ..yaml_files import read_yaml
from .config import BALANCED, CocoTrainingConfig

__all__ = ["ClassWeights", "class_weights_of", "criterion_of"]

logger = logging.getLogger(__name__)

SHOWN = 20  # weights in the log


class ClassWeights(NamedTuple):
    """Names of the classes, and the weight of each, by label."""

    names: tuple[str, ...]
    weights: list[float]


def class_weights_of(config: CocoTrainingConfig, dataset: CocoDataset) -> ClassWeights | None:
    """The weight of each class; None if the run has none.

    Args:
        config: the run, whose ``class_weights`` are "balanced" or a yaml file of names and numbers.
        dataset: what is trained on.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no table of names and positive numbers, or names a class that the data do not have.
    """
    if config.class_weights is None:
        return None
    names = dataset.class_names
    if config.class_weights == BALANCED:
        return ClassWeights(names, balanced_weights(dataset.objects_of_classes(), config.class_weights_beta))
    given = _read(Path(config.class_weights), names)
    return ClassWeights(names, [given.get(name, 1.0) for name in names])


def criterion_of(config: CocoTrainingConfig, model: nn.Module, weights: ClassWeights | None = None) -> nn.Module:
    """The losses of a run, with these weights of classes, if any, which the log then shows."""
    if weights is not None:
        pairs = [f"{name} {weight:.3g}" for name, weight in zip(*weights, strict=True)]
        more = ", ..." if len(pairs) > SHOWN else ""
        logger.info("weights of classes: %s%s", ", ".join(pairs[:SHOWN]), more)
    return build_criterion(
        model,
        assignment=config.assignment,
        positives=config.positives,
        class_weights=None if weights is None else weights.weights,
    )


def _read(path: Path, names: tuple[str, ...]) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"class_weights must be {BALANCED} or a yaml file of names and weights: there is no {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must have names of classes with weights, such as 'cat: 2.0', got {_shown(content)}")
    found = {}
    for key, weight in content.items():
        name = str(key)
        if name not in names:
            hint = did_you_mean(name, names, otherwise=f"; the classes are {', '.join(names)[:200]}")
            raise ValueError(f"{path}: the data have no class {name!r}{hint}")
        if type(weight) not in (int, float) or not 0 < weight < float("inf"):
            raise ValueError(f"{path}: the weight of {name!r} must be a positive number, got {_shown(weight)}")
        found[name] = float(weight)
    return found


def _shown(value: object) -> str:
    return reprlib.repr(value)
