"""The settings that transformers writes beside its weights, as a header of this package."""

from collections.abc import Mapping
from typing import Any

from .header import CheckpointHeader

__all__ = ["header_of_config"]

# names of settings here and there
_SHARED = {
    "num_queries": "num_queries",
    "num_heads": "encoder_attention_heads",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "dim_feedforward": "encoder_ffn_dim",
    "dropout": "dropout",
    "dilation": "dilation",
}
_MASK2FORMER = {
    "num_queries": "num_queries",
    "d_model": "hidden_dim",
    "num_heads": "num_attention_heads",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "dim_feedforward": "dim_feedforward",
    "encoder_dim_feedforward": "encoder_feedforward_dim",
    "dropout": "dropout",
    "class_loss": "class_weight",
    "mask_loss": "mask_weight",
    "dice_loss": "dice_weight",
    "no_object_weight": "no_object_weight",
    "loss_points": "train_num_points",
    "oversample_ratio": "oversample_ratio",
    "importance_ratio": "importance_sample_ratio",
}
# model_type: the detector, its settings, its backbone by default, and what its class numbers are
_DETECTORS: dict[str, tuple[str, dict[str, str], str, str]] = {
    "conditional_detr": ("conditional_detr_r50", {**_SHARED, "d_model": "d_model"}, "resnet50", "category_id"),
    "dab-detr": (
        "dab_detr_r50",
        {**_SHARED, "d_model": "hidden_size", "position_temperature": "temperature_height"},
        "resnet50",
        "category_id",
    ),
    "mask2former": ("mask2former_r50", _MASK2FORMER, "swin", "contiguous"),
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
    """What a ``config.json`` says of the detector, its sizes and its classes.

    Settings that the file leaves out have transformers' defaults, which are those of the detector here.

    Returns:
        A header that says nothing for models or backbones that are not in this package.

    Raises:
        ValueError: for a value that no model has.
    """
    if str(config.get("model_type")) not in _DETECTORS:
        return CheckpointHeader()
    model, names, by_default, numbers = _DETECTORS[str(config["model_type"])]
    backbone = _backbone(config, by_default)
    if backbone is None or not _is_like_ours(config):
        return CheckpointHeader()
    settings = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    if config["model_type"] == "mask2former" and type(settings.get("decoder_layers")) is int:
        settings["decoder_layers"] -= 1  # it counts the predictions, of which one comes before the first layer
    labels = config.get("id2label") or _LABELS_BY_DEFAULT
    if not isinstance(labels, dict) or not all(str(number).isdecimal() for number in labels):
        raise ValueError("id2label must be an object from numbers to names")
    categories = [{"id": int(number), "name": name} for number, name in labels.items()]
    categories.sort(key=lambda category: category["id"])
    settings |= {"num_groups": 1, "num_classes": len(labels), "backbone": backbone}
    return CheckpointHeader.from_json(
        {"model": model, "model_config": settings, "categories": categories, "labels": numbers}
    )


def _is_like_ours(config: Mapping[str, Any]) -> bool:
    """Whether a model has none of the variants that Mask2Former has in transformers alone."""
    if config["model_type"] != "mask2former":
        return True
    sizes = {config.get(name, 256) for name in ("hidden_dim", "feature_size", "mask_feature_size")}
    return len(sizes) == 1 and not config.get("pre_norm") and not config.get("enforce_input_projection")


def _backbone(config: Mapping[str, Any], by_default: str) -> str | None:
    """Its name here; None if it is no ResNet of torchvision."""
    nested = config.get("backbone_config")
    if not isinstance(nested, dict):
        name = config.get("backbone") or by_default
    elif nested.get("model_type") == "resnet":
        depths = nested.get("depths", [3, 4, 6, 3])
        name = _DEPTHS.get((nested.get("layer_type", "bottleneck"), tuple(depths) if isinstance(depths, list) else ()))
    else:
        name = nested.get("backbone", "resnet50") if nested.get("model_type") == "timm_backbone" else None
    return name if name in _DEPTHS.values() else None
