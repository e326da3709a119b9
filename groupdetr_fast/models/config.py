"""Settings that models share. A model's own configuration extends these and adds its own."""

import math
from dataclasses import dataclass, fields
from types import NoneType
from typing import ClassVar, Literal

__all__ = ["BaseConfig", "DenoisingConfig", "DetectorConfig", "check_temperature"]


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Sizes and backbone of a model.

    Attributes:
        num_classes: C; class indices are 0 ... C - 1. The original repositories use 91, indexed by COCO's category id.
        num_groups: K, groups of queries in training.
        num_queries: N, queries of one group.
        d_model: size of tokens and queries, a multiple of ``num_heads`` and of 4.
        num_heads: attention heads.
        encoder_layers, decoder_layers: numbers of layers.
        dim_feedforward: hidden size of the feed-forward blocks.
        dropout: probability, in the encoder and the decoder.
        backbone, backbone_weights, backbone_stages, dilation, frozen_stages: see ``layers.backbone.Backbone``.
        predicts_masks: whether the model predicts masks of the objects, and so trains on them. No setting.
    """

    predicts_masks: ClassVar[bool] = False

    num_classes: int = 91
    num_groups: int = 11
    num_queries: int = 300
    d_model: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.0
    backbone: str = "resnet50"
    backbone_weights: str | None = None
    backbone_stages: int | None = None
    dilation: bool = False
    frozen_stages: int = 2

    def __post_init__(self) -> None:
        sizes = ("num_classes", "num_groups", "num_queries", "num_heads", "decoder_layers", "dim_feedforward")
        for name in (*sizes, "d_model", "encoder_layers", "frozen_stages"):
            if isinstance(getattr(self, name), float | str | NoneType):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_layers", "frozen_stages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.backbone_stages is not None and self.backbone_stages < 1:
            raise ValueError(f"backbone_stages must be at least 1, got {self.backbone_stages}")
        if self.d_model < 1 or self.d_model % self.num_heads or self.d_model % 4:
            raise ValueError(f"d_model must be a multiple of 4 and of num_heads={self.num_heads}, got {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in (field.name for field in fields(self) if field.name.endswith(("_cost", "_loss"))):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative and must be finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(BaseConfig):
    """Settings of a detector of boxes.

    Attributes:
        input_norm: normalise the projected features by GroupNorm, as Deformable DETR does. For backbones whose features
            are large (those of linear bottlenecks, such as EfficientNet's): they would drown the position embedding.
        class_cost, l1_cost, giou_cost: weights of the matching cost.
        class_loss, l1_loss, giou_loss: weights of the losses.
        focal_alpha, focal_gamma: of the class cost and the class loss.
    """

    input_norm: bool = False
    class_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    class_loss: float = 1.0
    l1_loss: float = 5.0
    giou_loss: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"focal_alpha must be in [0, 1], got {self.focal_alpha}")
        if not 0 <= self.focal_gamma < math.inf:
            raise ValueError(f"focal_gamma must not be negative and must be finite, got {self.focal_gamma}")


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(DetectorConfig):
    """Settings of a detector that also learns from denoising queries; see ``layers.denoising``.

    Attributes:
        denoising_queries: positive denoising queries of one set; 0 trains without.
        label_noise: probability that a denoising query's label is replaced by a random one.
        box_noise: amount of noise on the boxes.
        denoising_scope: "first" makes one set of denoising queries, for query group 0, as the base model does; "every"
            makes one for each query group.
    """

    denoising_queries: int = 100
    label_noise: float = 0.2
    box_noise: float = 0.4
    denoising_scope: Literal["first", "every"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denoising_queries < 0:
            raise ValueError(f"denoising_queries must not be negative, got {self.denoising_queries}")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise must be in [0, 1], got {self.label_noise}")
        if not 0 <= self.box_noise < math.inf:
            raise ValueError(f"box_noise must not be negative and must be finite, got {self.box_noise}")
        if self.denoising_scope not in ("first", "every"):
            raise ValueError(f'denoising_scope must be "first" or "every", got {self.denoising_scope!r}')


def check_temperature(position_temperature: float) -> None:
    """Check the base of the wave lengths of a position embedding.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not 0 < position_temperature < math.inf:
        raise ValueError(f"position_temperature must be positive and finite, got {position_temperature}")
