"""Detectors by name."""

from dataclasses import fields
from typing import Any

from .conditional_detr import ConditionalDetr, ConditionalDetrConfig
from .config import BaseConfig
from .dab_deformable_detr import DabDeformableDetr, DabDeformableDetrConfig
from .dab_detr import DabDetr, DabDetrConfig
from .detector import Detector
from .dino import Dino, DinoConfig
from .dn_detr import DnDetr, DnDetrConfig
from .mask2former import Mask2Former, Mask2FormerConfig

__all__ = ["build_model", "model_config", "model_names"]

# name: (module, configuration, settings that differ from the configuration's defaults)
_MODELS: dict[str, tuple[type[Detector], type[BaseConfig], dict[str, Any]]] = {
    "conditional_detr_r50": (ConditionalDetr, ConditionalDetrConfig, {}),
    "conditional_detr_r50_dc5": (ConditionalDetr, ConditionalDetrConfig, {"dilation": True}),
    "dab_detr_r50": (DabDetr, DabDetrConfig, {}),
    "dab_detr_r50_dc5": (DabDetr, DabDetrConfig, {"dilation": True}),
    "dn_detr_r50": (DnDetr, DnDetrConfig, {}),
    "dn_detr_r50_dc5": (DnDetr, DnDetrConfig, {"dilation": True}),
    "dab_deformable_detr_r50": (DabDeformableDetr, DabDeformableDetrConfig, {}),
    "dino_4scale_r50": (Dino, DinoConfig, {}),
    "mask2former_r50": (Mask2Former, Mask2FormerConfig, {}),
}


def model_names() -> list[str]:
    """Names that :func:`build_model` knows."""
    return sorted(_MODELS)


def model_config(name: str, **overrides: Any) -> BaseConfig:
    """The configuration of a named model, with some settings replaced.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for an unknown name, an unknown setting or a value that a setting cannot have.
    """
    _, config_type, settings = _lookup(name)
    known = [field.name for field in fields(config_type)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(known)}")
    return config_type(**{**settings, **overrides})


def build_model(name: str, *, num_classes: int, num_groups: int, **overrides: Any) -> Detector:
    """Build a detector.

    Args:
        name: one of :func:`model_names`.
        num_classes: C, number of classes.
        num_groups: K, groups of queries in training; 1 gives the base model.
        **overrides: any field of the model's configuration, such as ``num_queries``, ``d_model`` or ``backbone``.

    Returns:
        The model, whose ``config`` attribute holds every setting.

    Raises:
        TypeError, ValueError: as :func:`model_config`; ValueError also for a backbone that does not exist.
    """
    model_type, _, _ = _lookup(name)
    return model_type(model_config(name, num_classes=num_classes, num_groups=num_groups, **overrides))


def _lookup(name: str) -> tuple[type[Detector], type[BaseConfig], dict[str, Any]]:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(model_names())}")
    return _MODELS[name]
