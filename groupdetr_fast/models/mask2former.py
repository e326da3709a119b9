"""Mask2Former (Cheng et al., CVPR 2022) for instance segmentation, with groups of queries.

Image -> backbone -> pixel decoder -> three maps of tokens, and mask features. A query is a learned content vector and a
learned position. Its mask is the product of an embedding and the mask features; each decoder layer lets it see the
tokens inside that mask, of one map after another, and then the queries of its group. Only decoder self-attention knows
about groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups import QueryGroups
from ..layers.attention import MultiheadProjections, attend_under_mask, split_heads
from ..layers.backbone import Backbone
from ..layers.deformable_attention import initialize_deformable
from ..layers.deformable_encoder import DeformableEncoder
from ..layers.deformable_levels import InputProjections, join_levels, norm_groups
from ..layers.grouped_self_attention import GroupedSelfAttention
from ..layers.initialization import initialize_matrices
from ..layers.mlp import MLP
from ..layers.position import image_position_embedding
from ..layers.transformer_layer import TransformerLayer, relu_in_place
from ..targets import PackedTargets
from .config import BaseConfig
from .detector import Detector, group_rows
from .output import SegmentationOutput

__all__ = ["Mask2Former", "Mask2FormerConfig"]

FRAME_MULTIPLE = 32  # pixels; SIZE_DIVISIBILITY of the repository, the stride of a ResNet's last map


@dataclass(frozen=True, kw_only=True)
class Mask2FormerConfig(BaseConfig):
    """Configuration of :class:`Mask2Former`; the defaults are those of the repository for COCO with 11 groups.

    Attributes:
        num_levels: maps of tokens, the backbone's last; the one before them gives the mask features.
        num_points: samples per head and level of deformable attention in the pixel decoder.
        encoder_dim_feedforward: hidden size of the feed-forward blocks of the pixel decoder.
        class_cost, mask_cost, dice_cost: weights of the matching cost.
        class_loss, mask_loss, dice_loss: weights of the losses.
        no_object_weight: of queries without an object in the class loss.
        loss_points: points of a mask at which costs and losses are computed.
        oversample_ratio: random points per point of the loss, of which the most uncertain are taken.
        importance_ratio: part of the points of the loss that are taken for their uncertainty.
    """

    predicts_masks: ClassVar[bool] = True

    num_classes: int = 80
    num_queries: int = 100
    decoder_layers: int = 9
    frozen_stages: int = 0
    num_levels: int = 3
    num_points: int = 4
    encoder_dim_feedforward: int = 1024
    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0
    class_loss: float = 2.0
    mask_loss: float = 5.0
    dice_loss: float = 5.0
    no_object_weight: float = 0.1
    loss_points: int = 12544
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_levels", "num_points", "encoder_dim_feedforward", "loss_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.oversample_ratio < math.inf:
            raise ValueError(f"oversample_ratio must be at least 1 and finite, got {self.oversample_ratio}")
        if not 0 <= self.no_object_weight < math.inf:
            raise ValueError(f"no_object_weight must not be negative and must be finite, got {self.no_object_weight}")
        if not 0 <= self.importance_ratio <= 1:
            raise ValueError(f"importance_ratio must be in [0, 1], got {self.importance_ratio}")


class PixelDecoder(nn.Module):
    """Encodes all maps but the finest together, and adds the result to the finest one (section 3.2.2).

    The whole frame is image to it, padding included, as in the original repository. Levels are in its order, coarsest
    first.

    Args:
        in_channels: channels of the backbone's maps, finest first.
    """

    def __init__(self, config: Mask2FormerConfig, in_channels: Sequence[int]):
        super().__init__()
        dim, levels = config.d_model, config.num_levels
        finest, *others = in_channels
        self.input_proj = InputProjections(others[::-1], levels, dim)
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.encoder = DeformableEncoder(
            config.encoder_layers,
            dim,
            config.num_heads,
            config.encoder_dim_feedforward,
            config.dropout,
            num_levels=levels,
            num_points=config.num_points,
        )
        groups = norm_groups(dim)
        self.lateral = nn.Sequential(nn.Conv2d(finest, dim, 1, bias=False), nn.GroupNorm(groups, dim))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
        self.mask_features = nn.Conv2d(dim, dim, 1)
        initialize_deformable(self.encoder)
        for convolution in (self.lateral[0], self.smooth[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.get_parameter("weight"), a=1)
        nn.init.zeros_(self.mask_features.get_parameter("bias"))

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Decode.

        Args:
            features: ``[B, C, h, w]`` per map of the backbone, finest first.

        Returns:
            The encoded maps ``[B, d, h, w]``, coarsest first, and the mask features ``[B, d, h, w]`` of the finest.
        """
        finest, *others = features
        tokens, position, levels = join_levels(self.input_proj(others[::-1]), None, self.level_embed)
        encoded = self.encoder(tokens, position, levels)
        parts = encoded.split([height * width for height, width in levels.shapes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, levels.shapes, strict=True)]
        above = F.interpolate(maps[-1], size=finest.shape[-2:], mode="bilinear", align_corners=False)
        return maps, self.mask_features(self.smooth(self.lateral(finest) + above))


class PixelMemory(NamedTuple):
    """What the decoder sees of the images.

    Attributes:
        maps: ``[B, d, h, w]`` per level, coarsest first.
        mask_features: ``[B, d, h, w]``.
        padding: ``[B, H, W]`` bool, True on padding of the frame; see ``SegmentationOutput``.
    """

    maps: list[Tensor]
    mask_features: Tensor
    padding: Tensor


class MaskedCrossAttention(MultiheadProjections):
    """Multi-head attention of each query to the image tokens that a mask leaves visible to it (section 3.2.1)."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__(dim, num_heads, dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attend.

        Args:
            query: ``[B, L, d]``, content plus position.
            key: ``[B, S, d]``, tokens plus position.
            value: ``[B, S, d]``, tokens.
            visible: ``[B, L, S]`` bool, at least one True in every row.

        Returns:
            ``[B, L, d]``.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            split_heads(F.linear(x, weight, bias), self.num_heads).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        # One mask for all heads: it is broadcast, not repeated.
        out = attend_under_mask(query, key, value, visible[:, None], self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def visible_tokens(mask_embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """The tokens inside the mask that each query predicts; all of them where the mask is empty.

    Args:
        mask_embeddings: ``[B, L, d]``.
        mask_features: ``[B, d, S]``, at the resolution of the tokens. Interpolating the features gives the same mask as
            interpolating the mask's logits, their product with the embeddings, since both are linear.

    Returns:
        ``[B, L, S]`` bool.
    """
    inside = mask_embeddings @ mask_features >= 0
    return inside | ~inside.any(-1, keepdim=True)


class Mask2FormerDecoderLayer(TransformerLayer):
    """Masked cross-attention, grouped self-attention and feed-forward block, in this order."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        dim = config.d_model
        self.dropout = config.dropout
        self.cross_attn = MaskedCrossAttention(dim, config.num_heads, config.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = GroupedSelfAttention(dim, config.num_heads, config.dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, config.dim_feedforward)
        self.activation = relu_in_place()
        self.linear2 = nn.Linear(config.dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, content: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, visible: Tensor, groups: QueryGroups
    ) -> Tensor:
        """One layer; see ``MaskedCrossAttention`` for ``key``, ``value`` and ``visible``.

        Args:
            content: ``[B, L, d]``.
            query_pos: ``[1, L, d]``.
            groups: how the L queries fall into groups.

        Returns:
            ``[B, L, d]``.
        """
        content = self.norm1(content + self._drop(self.cross_attn(content + query_pos, key, value, visible)))
        content = self.norm2(content + self._drop(self.self_attn(content, query_pos, groups)))
        return self.norm3(content + self._feed_forward(content))


class Mask2FormerDecoder(nn.Module):
    """Decoder layers that take the maps in turn, coarsest first, and the masks that say what each query sees."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Mask2FormerDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.level_embed = nn.Embedding(config.num_levels, config.d_model)
        initialize_matrices(self.layers)

    def forward(
        self,
        content: Tensor,
        query_pos: Tensor,
        memory: PixelMemory,
        groups: QueryGroups,
        mask_embed: MLP,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: ``[B, L, d]``.
            query_pos: ``[1, L, d]``.
            memory: the encoded images.
            groups: how the L queries fall into groups.
            mask_embed: makes contents into the embeddings of their masks.

        Returns:
            Contents and mask embeddings, ``[1 + layers, B, L, d]`` each: of the learned queries, and after every layer.
        """
        keys, values, features = [], [], []
        mask_features = memory.mask_features.detach()  # masks of attention have no gradient
        for level, embedding in zip(memory.maps, self.level_embed.weight, strict=True):
            dim, height, width = level.shape[1:]
            values.append(level.flatten(2).transpose(1, 2) + embedding)
            everywhere = torch.zeros(1, height, width, dtype=torch.bool, device=level.device)
            keys.append(values[-1] + image_position_embedding(everywhere, dim, dtype=level.dtype).flatten(1, 2))
            smaller = F.interpolate(mask_features, size=(height, width), mode="bilinear", align_corners=False)
            features.append(smaller.flatten(2))
        contents = [self.norm(content)]
        embeddings = [mask_embed(contents[-1])]
        for index, layer in enumerate(self.layers):
            turn = index % len(memory.maps)
            visible = visible_tokens(embeddings[-1], features[turn])
            content = layer(content, query_pos, keys[turn], values[turn], visible, groups)
            contents.append(self.norm(content))
            embeddings.append(mask_embed(contents[-1]))
        return torch.stack(contents), torch.stack(embeddings)


class Mask2Former(Detector):
    """Mask2Former with ``config.num_groups`` groups of queries; with one group it is the base model."""

    group_parameters = ("query_feat.weight", "query_embed.weight")  # group-major rows
    config: Mask2FormerConfig

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        dim, queries = config.d_model, config.num_groups * config.num_queries
        self.backbone = Backbone(
            config.backbone,
            config.backbone_weights,
            stages=config.backbone_stages,
            num_levels=config.num_levels + 1,
            dilation=config.dilation,
            frozen_stages=config.frozen_stages,
        )
        self.pixel_decoder = PixelDecoder(config, self.backbone.num_channels)
        self.decoder = Mask2FormerDecoder(config)
        self.query_feat = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)
        self.class_embed = nn.Linear(dim, config.num_classes + 1)
        self.mask_embed = MLP(dim, dim, dim, 3)

    def encode(self, images: Tensor, masks: Tensor | None) -> PixelMemory:
        """Images ``[B, 3, H, W]``, padded here to multiples of 32 pixels, and their padding -> what the decoder sees.

        The padding ``[B, H, W]`` is part of the image to this model, as in the original repository, and only noted in
        the output.
        """
        batch, _, height, width = images.shape
        if masks is None:
            masks = torch.zeros(batch, height, width, dtype=torch.bool, device=images.device)
        frame = (0, -width % FRAME_MULTIPLE, 0, -height % FRAME_MULTIPLE)
        maps, mask_features = self.pixel_decoder(self.backbone(F.pad(images, frame)))
        return PixelMemory(maps, mask_features, F.pad(masks, frame, value=True))

    def decode(
        self, memory: PixelMemory, groups: QueryGroups, first: int = 0, targets: PackedTargets | None = None
    ) -> SegmentationOutput:
        """See :meth:`Detector.decode`; the predictions of the learned queries come before those of the layers."""
        content = group_rows(self.query_feat.weight, groups, first).expand(len(memory.padding), -1, -1)
        query_pos = group_rows(self.query_embed.weight, groups, first)
        contents, embeddings = self.decoder(content, query_pos, memory, groups, self.mask_embed)
        logits = self.class_embed(contents)
        return SegmentationOutput(logits, embeddings, memory.mask_features, memory.padding, groups)
