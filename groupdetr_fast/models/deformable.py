"""What the detectors with deformable attention share: backbone, feature levels and encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.backbone import Backbone
from ..layers.deformable_attention import initialize_deformable
from ..layers.deformable_encoder import DeformableEncoder
from ..layers.deformable_levels import InputProjections, Levels, join_levels
from .config import DetectorConfig, check_temperature
from .detector import Detector

__all__ = ["DeformableConfig", "DeformableDetector"]


@dataclass(frozen=True, kw_only=True)
class DeformableConfig(DetectorConfig):
    """Settings of the deformable detectors.

    Attributes:
        num_levels: feature levels.
        backbone_levels: how many of them are the backbone's last stages; each of the others has half the resolution of
            the one before.
        num_points: samples per head and level of deformable attention.
        position_temperature: of the position embedding of the image.
    """

    num_levels: int = 4
    backbone_levels: int = 3
    num_points: int = 4
    input_norm: bool = True
    position_temperature: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {self.num_points}")
        check_temperature(self.position_temperature)
        if not 1 <= self.backbone_levels <= self.num_levels:
            raise ValueError(
                f"backbone_levels must be in [1, num_levels], got {self.backbone_levels} of {self.num_levels} levels"
            )


class DeformableDetector(Detector):
    """Backbone, projections to ``num_levels`` levels, level embedding and encoder.

    Args:
        position_offset: see ``image_position_embedding``.
    """

    config: DeformableConfig

    def __init__(self, config: DeformableConfig, *, position_offset: float):
        super().__init__(config)
        self.position_offset = position_offset
        self.backbone = Backbone(
            config.backbone,
            config.backbone_weights,
            stages=config.backbone_stages,
            num_levels=config.backbone_levels,
            dilation=config.dilation,
            frozen_stages=config.frozen_stages,
        )
        self.input_proj = InputProjections(
            self.backbone.num_channels, config.num_levels, config.d_model, norm=config.input_norm
        )
        self.level_embed = nn.Parameter(torch.randn(config.num_levels, config.d_model))
        self.encoder = DeformableEncoder(
            config.encoder_layers,
            config.d_model,
            config.num_heads,
            config.dim_feedforward,
            config.dropout,
            num_levels=config.num_levels,
            num_points=config.num_points,
        )
        initialize_deformable(self.encoder)

    def encode(self, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Levels]:
        """Images ``[B, 3, H, W]`` and their padding ``[B, H, W]`` -> memory ``[B, S, d]`` and where its tokens lie."""
        tokens, position, levels = join_levels(
            self.input_proj(self.backbone(images)),
            masks,
            self.level_embed,
            temperature=self.config.position_temperature,
            position_offset=self.position_offset,
        )
        return self.encoder(tokens, position, levels), levels
