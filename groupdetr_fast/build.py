"""Where models and training meet: the criterion that belongs to a model."""

from torch import nn

from .models.config import DetectorConfig
from .models.registry import model_config
from .training.criterion import SetCriterion
from .training.matcher import GroupMatcher

__all__ = ["build_criterion"]


def build_criterion(model_or_config_or_name: nn.Module | DetectorConfig | str) -> SetCriterion:
    """The criterion with the weights of a model.

    Args:
        model_or_config_or_name: a model of this package (also wrapped, as by DistributedDataParallel), its
            configuration, or its name.

    Raises:
        TypeError: for anything else.
    """
    source = model_or_config_or_name
    if isinstance(source, str):
        source = model_config(source)
    elif isinstance(source, nn.Module):
        source = getattr(getattr(source, "module", source), "config", source)
    if not isinstance(source, DetectorConfig):
        raise TypeError(f"expected a model of this package, its configuration or its name, got {type(source).__name__}")
    matcher = GroupMatcher(source.class_cost, source.l1_cost, source.giou_cost, source.focal_alpha, source.focal_gamma)
    return SetCriterion(
        matcher,
        class_loss=source.class_loss,
        l1_loss=source.l1_loss,
        giou_loss=source.giou_loss,
        alpha=source.focal_alpha,
        gamma=source.focal_gamma,
    )
