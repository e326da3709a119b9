"""The settings that transformers writes beside its weights, as a header of this package."""

from collections.abc import Mapping
from typing import Any

from .header import CheckpointHeader

__all__ = ["header_of_config"]

# model_type: the detector, and the names of its settings here and there
_SHARED = {
    "num_queries": "num_queries",
    "num_heads": "encoder_attention_heads",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "dim_feedforward": "encoder_ffn_dim",
    "dropout": "dropout",
    "dilation": "dilation",
}
_DETECTORS: dict[str, tuple[str, dict[str, str]]] = {
    "conditional_detr": ("conditional_detr_r50", {**_SHARED, "d_model": "d_model"}),
    "dab-detr": ("dab_detr_r50", {**_SHARED, "d_model": "hidden_size", "position_temperature": "temperature_height"}),
}
_DEPTHS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_LABELS_BY_DEFAULT = {"0": "LABEL_0", "1": "LABEL_1"}  # which transformers leaves out of the file


def header_of_config(config: Mapping[str, Any]) -> CheckpointHeader:
    """What a ``config.json`` says of the detector, its sizes and its classes, whose numbers are category ids.

    Settings that the file leaves out have transformers' defaults, which are those of the detector here.

    Returns:
        A header that says nothing for models or backbones that are not in this package.

    Raises:
        ValueError: for a value that no model has.
    """
    known = _DETECTORS.get(str(config.get("model_type")))
    backbone = _backbone(config)
    if known is None or backbone is None:
        return CheckpointHeader()
    model, names = known
    settings = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    labels = config.get("id2label") or _LABELS_BY_DEFAULT
    if not isinstance(labels, dict) or not all(str(number).isdecimal() for number in labels):
        raise ValueError("id2label must be an object from numbers to names")
    categories = [{"id": int(number), "name": name} for number, name in labels.items()]
    categories.sort(key=lambda category: category["id"])
    settings |= {"num_groups": 1, "num_classes": len(labels), "backbone": backbone}
    return CheckpointHeader.from_json({"model": model, "model_config": settings, "categories": categories})


def _backbone(config: Mapping[str, Any]) -> str | None:
    """Its name here; None if it is no ResNet of torchvision."""
    nested = config.get("backbone_config")
    if not isinstance(nested, dict):
        name = config.get("backbone") or "resnet50"
    elif nested.get("model_type") == "resnet":
        depths = nested.get("depths", [3, 4, 6, 3])
        name = _DEPTHS.get((nested.get("layer_type", "bottleneck"), tuple(depths) if isinstance(depths, list) else ()))
    else:
        name = nested.get("backbone", "resnet50") if nested.get("model_type") == "timm_backbone" else None
    return name if name in _DEPTHS.values() else None
