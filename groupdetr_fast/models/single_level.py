"""What the detectors on a single feature map have in common: everything before their decoder."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.backbone import Backbone
from ..layers.conditional_decoder import Memory
from ..layers.encoder import TransformerEncoder
from ..layers.position import image_position_embedding
from ..layers.transformer_layer import relu_in_place
from .config import DetectorConfig
from .detector import Detector

__all__ = ["SingleLevelDetr"]


class SingleLevelDetr(Detector):
    """Image -> backbone -> 1x1 projection -> encoder -> memory.

    A detector adds its queries, ``decoder``, ``class_embed``, ``bbox_embed`` and :meth:`decode`, and initialises all
    but the backbone and the projection.

    Args:
        activation: of the encoder's feed-forward blocks.
        scale_position: let each encoder layer scale the position embedding by its input.
        position_temperature: base of the wave lengths of the position embedding.
    """

    config: DetectorConfig

    def __init__(
        self,
        config: DetectorConfig,
        *,
        activation: Callable[[], nn.Module] = relu_in_place,
        scale_position: bool = False,
        position_temperature: float = 10000.0,
    ):
        super().__init__(config)
        self.position_temperature = position_temperature
        dim = config.d_model
        self.backbone = Backbone(
            config.backbone,
            config.backbone_weights,
            stages=config.backbone_stages,
            dilation=config.dilation,
            frozen_stages=config.frozen_stages,
        )
        self.input_proj = nn.Conv2d(self.backbone.num_channels[-1], dim, 1)
        self.input_norm = nn.GroupNorm(math.gcd(32, dim), dim) if config.input_norm else nn.Identity()
        self.encoder = TransformerEncoder(
            config.encoder_layers,
            dim,
            config.num_heads,
            config.dim_feedforward,
            config.dropout,
            activation=activation,
            scale_position=scale_position,
        )

    def encode(self, images: Tensor, masks: Tensor | None) -> Memory:
        """``images`` ``[B, 3, H, W]``, ``masks`` ``[B, H, W]`` bool, True on padding -> what the decoder sees."""
        features = self.input_norm(self.input_proj(self.backbone(images)[-1]))  # [B, d, h, w]
        dim, height, width = features.shape[1:]
        if masks is None:
            outside = torch.zeros(1, height, width, dtype=torch.bool, device=images.device)
        else:
            outside = F.interpolate(masks[:, None].to(images.dtype), size=(height, width))[:, 0].bool()
        position = image_position_embedding(outside, dim, self.position_temperature, features.dtype).flatten(1, 2)
        tokens = features.flatten(2).transpose(1, 2)
        padding = None if masks is None else outside.flatten(1)
        return Memory(self.encoder(tokens, position, padding), position, padding)
