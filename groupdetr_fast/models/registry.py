"""Detectors by name."""

from dataclasses import fields
from typing import Any

from torch import nn

from .conditional_detr import ConditionalDetr, ConditionalDetrConfig
from .config import DetectorConfig

__all__ = ["build_model", "model_config", "model_names"]

# name: (module, configuration, settings that differ from the configuration's defaults)
_MODELS: dict[str, tuple[type[nn.Module], type[DetectorConfig], dict[str, Any]]] = {
    "conditional_detr_r50": (ConditionalDetr, ConditionalDetrConfig, {}),
    "conditional_detr_r50_dc5": (ConditionalDetr, ConditionalDetrConfig, {"dilation": True}),
}


def model_names() -> list[str]:
    """Names that :func:`build_model` knows."""
    return sorted(_MODELS)


def model_config(name: str, **overrides: Any) -> DetectorConfig:
    """The configuration of a named model, with some settings replaced.

    Raises:
        ValueError: for an unknown name, an unknown setting or a value that a setting cannot have.
    """
    _, config_type, settings = _lookup(name)
    known = [field.name for field in fields(config_type)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(known)}")
    return config_type(**{**settings, **overrides})


def build_model(name: str, *, num_classes: int, num_groups: int, **overrides: Any) -> nn.Module:
    """Build a detector.

    Args:
        name: one of :func:`model_names`.
        num_classes: C, number of classes.
        num_groups: K, groups of queries in training; 1 gives the base model.
        **overrides: any field of the model's configuration, such as ``num_queries``, ``d_model`` or ``backbone``.

    Returns:
        The model, whose ``config`` attribute holds every setting.

    Raises:
        ValueError: as :func:`model_config`, and for a backbone that does not exist.
    """
    model_type, _, _ = _lookup(name)
    return model_type(model_config(name, num_classes=num_classes, num_groups=num_groups, **overrides))


def _lookup(name: str) -> tuple[type[nn.Module], type[DetectorConfig], dict[str, Any]]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(model_names())}")
    return _MODELS[name]
