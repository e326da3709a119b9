"""Conditional DETR (Meng et al., ICCV 2021) with groups of queries.

Image -> backbone -> 1x1 projection -> encoder -> decoder -> class and box heads. Each query is one learned vector: it
gives the query's position embedding and, through ``ref_point_head``, a reference point. Cross-attention looks for
content around that point; the box head predicts an offset to it. Only decoder self-attention knows about groups.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups import QueryGroups
from ..layers.backbone import Backbone
from ..layers.conditional_decoder import ConditionalDecoderLayer, Memory
from ..layers.encoder import TransformerEncoder
from ..layers.mlp import MLP, inverse_sigmoid
from ..layers.position import image_position_embedding, sine_position_embedding
from ..layers.queries import choose_groups, group_rows
from .config import DetectorConfig
from .output import DetectorOutput

__all__ = ["ConditionalDetr", "ConditionalDetrConfig"]

CLASS_PRIOR = 0.01  # probability that every class starts with (focal loss, section 4.1)


@dataclass(frozen=True, kw_only=True)
class ConditionalDetrConfig(DetectorConfig):
    """Configuration of :class:`ConditionalDetr`; the defaults are those of the paper with 11 groups."""

    dropout: float = 0.1
    class_loss: float = 2.0


class ConditionalDecoder(nn.Module):
    """Decoder layers, the reference point of each query, and the scale of its sine embedding."""

    def __init__(self, config: ConditionalDetrConfig):
        super().__init__()
        dim = config.d_model
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(dim, config.num_heads, config.dim_feedforward, config.dropout, first=index == 0)
            for index in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(dim, dim, 2, 2)

    def forward(self, query_pos: Tensor, memory: Memory, groups: QueryGroups) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            query_pos: ``[1, L, d]``.
            memory: the image.
            groups: how the L queries fall into groups.

        Returns:
            Contents after every layer ``[layers, B, L, d]``, and reference points ``[1, L, 2]`` before the sigmoid.
        """
        reference = self.ref_point_head(query_pos)
        sine = sine_position_embedding(reference.sigmoid(), query_pos.shape[-1])
        content = query_pos.new_zeros(len(memory.tokens), *query_pos.shape[1:])
        outputs = []
        for index, layer in enumerate(self.layers):
            query_sine = sine if index == 0 else sine * self.query_scale(content)
            content = layer(content, query_pos, query_sine, memory, groups)
            outputs.append(self.norm(content))
        return torch.stack(outputs), reference


class ConditionalDetr(nn.Module):
    """Conditional DETR with ``config.num_groups`` groups; with one group it is the base model."""

    group_parameters = ("query_embed.weight",)  # group-major rows; all other parameters serve every group

    def __init__(self, config: ConditionalDetrConfig):
        super().__init__()
        self.config = config
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
            config.encoder_layers, dim, config.num_heads, config.dim_feedforward, config.dropout
        )
        self.decoder = ConditionalDecoder(config)
        self.query_embed = nn.Embedding(config.num_groups * config.num_queries, dim)
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in (self.encoder, self.decoder):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_embed.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        targets: object = None,
        *,
        num_groups: int | None = None,
        inference_group: int = 0,
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: ``[B, 3, H, W]``, normalised as the backbone expects.
            masks: ``[B, H, W]`` bool, True on padding; None if no image is padded.
            targets: accepted, since every detector is called alike, and not used: this model has no denoising queries.
            num_groups: groups to use; default all in training mode and one in evaluation mode.
            inference_group: the group to use where one is used.

        Returns:
            The predictions of every decoder layer.
        """
        groups, first = choose_groups(
            self.config.num_groups, self.config.num_queries, self.training, num_groups, inference_group
        )
        memory = self._encode(images, masks)
        query_pos = group_rows(self.query_embed.weight, groups, first)
        outputs, reference = self.decoder(query_pos, memory, groups)
        offsets = self.bbox_embed(outputs)
        center = (offsets[..., :2] + inverse_sigmoid(reference.sigmoid())).sigmoid()
        boxes = torch.cat((center, offsets[..., 2:].sigmoid()), dim=-1)
        return DetectorOutput(self.class_embed(outputs), boxes, groups)

    def _encode(self, images: Tensor, masks: Tensor | None) -> Memory:
        features = self.input_norm(self.input_proj(self.backbone(images)[-1]))  # [B, d, h, w]
        dim, height, width = features.shape[1:]
        if masks is None:
            padding = torch.zeros(1, height, width, dtype=torch.bool, device=images.device)
        else:
            padding = F.interpolate(masks[:, None].to(images.dtype), size=(height, width))[:, 0].bool()
        position = image_position_embedding(padding, dim, dtype=features.dtype).flatten(1, 2)
        tokens = features.flatten(2).transpose(1, 2)
        padding = None if masks is None else padding.flatten(1)
        return Memory(self.encoder(tokens, position, padding), position, padding)
