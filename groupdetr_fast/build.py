"""Where models and training meet: the criterion that belongs to a model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from .losses.criterion import SetCriterion
from .losses.mask_criterion import MaskCriterion
from .losses.mask_matcher import MaskMatcher
from .losses.matcher import Assignment, GroupMatcher
from .models.config import BaseConfig, DetectorConfig
from .models.detector import Detector
from .models.mask2former import Mask2FormerConfig
from .models.registry import model_config

__all__ = ["build_criterion"]


@runtime_checkable
class MakesCriterion(Protocol):
    """A model that has losses of its own, as those of transformers do."""

    def make_criterion(self) -> nn.Module:
        """A module that is called as the criteria of this package are."""


def build_criterion(
    model_or_config_or_name: nn.Module | BaseConfig | str,
    *,
    assignment: Assignment = "group",
    positives: int | None = None,
    class_weights: Sequence[float] | None = None,
) -> SetCriterion | MaskCriterion | nn.Module:
    """The criterion with the weights of a model.

    Args:
        model_or_config_or_name: a model of this package (also wrapped, as by DistributedDataParallel), its
            configuration, or its name.
        assignment, positives: see ``losses.matcher.GroupMatcher``; the defaults are those of Group DETR.
        class_weights: one for each class, in the class loss of queries with an object; see ``losses.SetCriterion``.

    Raises:
        TypeError: for anything else.
        ValueError: for another assignment than "group" with a model that predicts masks or has losses of its own, or
            one that does not exist; for class weights that do not fit.
    """
    source = model_or_config_or_name
    if isinstance(source, str):
        source = model_config(source)
    elif isinstance(source, nn.Module):
        known = (module for module in source.modules() if isinstance(module, Detector | MakesCriterion))
        model = next(known, source)
        if isinstance(model, MakesCriterion):
            _require_default(type(model).__name__, assignment, positives)
            if class_weights is not None:
                raise ValueError(f"{type(model).__name__} has losses of its own, which take no class_weights")
            return model.make_criterion()
        source = model.config if isinstance(model, Detector) else model
    if class_weights is not None and isinstance(source, BaseConfig) and len(class_weights) != source.num_classes:
        raise ValueError(f"class_weights must be {source.num_classes}, one for each class, got {len(class_weights)}")
    if isinstance(source, Mask2FormerConfig):
        _require_default(type(source).__name__, assignment, positives)
        return _mask_criterion(source, class_weights)
    if isinstance(source, DetectorConfig):
        return _box_criterion(source, assignment, positives, class_weights)
    raise TypeError(f"expected a model of this package, its configuration or its name, got {type(source).__name__}")


def _require_default(name: str, assignment: Assignment, positives: int | None) -> None:
    if assignment != "group" or positives is not None:
        raise ValueError(f'{name} is trained with the default assignment, "group", alone')


def _box_criterion(
    config: DetectorConfig, assignment: Assignment, positives: int | None, class_weights: Sequence[float] | None
) -> SetCriterion:
    matcher = GroupMatcher(
        config.class_cost,
        config.l1_cost,
        config.giou_cost,
        config.focal_alpha,
        config.focal_gamma,
        assignment,
        positives,
    )
    return SetCriterion(
        matcher,
        class_loss=config.class_loss,
        l1_loss=config.l1_loss,
        giou_loss=config.giou_loss,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        class_weights=class_weights,
    )


def _mask_criterion(config: Mask2FormerConfig, class_weights: Sequence[float] | None) -> MaskCriterion:
    return MaskCriterion(
        MaskMatcher(config.class_cost, config.mask_cost, config.dice_cost, config.loss_points),
        class_loss=config.class_loss,
        mask_loss=config.mask_loss,
        dice_loss=config.dice_loss,
        no_object_weight=config.no_object_weight,
        num_points=config.loss_points,
        oversample_ratio=config.oversample_ratio,
        importance_ratio=config.importance_ratio,
        class_weights=class_weights,
    )
