"""DAB-Deformable-DETR (Liu et al., ICLR 2022) with groups of queries.

Image -> backbone -> four feature levels -> deformable encoder -> decoder. A query is a learned content vector and a
learned anchor box. Its position embedding is made from the box, deformable cross-attention samples inside the box, and
every decoder layer refines the box. Only decoder self-attention knows about groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..groups import QueryGroups
from ..layers.deformable_attention import initialize_deformable
from ..layers.deformable_decoder import DeformableDecoderLayer, boxes_in_levels
from ..layers.deformable_levels import Levels
from ..layers.initialization import initialize_heads
from ..layers.mlp import ANCHOR_EPS, MLP, inverse_sigmoid
from ..layers.position import sine_position_embedding
from ..targets import PackedTargets
from .deformable import DeformableConfig, DeformableDetector
from .detector import group_rows
from .output import DetectorOutput

__all__ = ["DabDeformableDetr", "DabDeformableDetrConfig"]


@dataclass(frozen=True, kw_only=True)
class DabDeformableDetrConfig(DeformableConfig):
    """Configuration of :class:`DabDeformableDetr`; the defaults are those of the paper with 11 groups."""


class DabDeformableDecoder(nn.Module):
    """Decoder layers, and the position embedding that each makes of the queries' boxes."""

    def __init__(self, config: DabDeformableDetrConfig):
        super().__init__()
        dim = config.d_model
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(
                dim,
                config.num_heads,
                config.dim_feedforward,
                config.dropout,
                num_levels=config.num_levels,
                num_points=config.num_points,
            )
            for _ in range(config.decoder_layers)
        )
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)

    def forward(
        self,
        content: Tensor,
        boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        groups: QueryGroups,
        box_heads: nn.ModuleList,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: ``[B, L, d]``.
            boxes: ``[B or 1, L, 4]`` ``cxcywh`` in [0, 1], the anchors.
            memory: ``[B, S, d]``, output of the encoder.
            levels: where the S tokens lie.
            groups: how the L queries fall into groups.
            box_heads: one per layer; each predicts how the layer moves the boxes.

        Returns:
            Contents ``[layers, B, L, d]`` and boxes ``[layers, B, L, 4]`` after every layer. No gradient flows from a
            layer's boxes to those of the layer before.
        """
        contents, refined = [], []
        for index, (layer, head) in enumerate(zip(self.layers, box_heads, strict=True)):
            reference = boxes_in_levels(boxes, levels)
            # As in the original repository, the embedding is that of the boxes in units of the first, padded level.
            query_pos = self.ref_point_head(sine_position_embedding(reference[:, :, 0], content.shape[-1]))
            if index > 0:
                query_pos = query_pos * self.query_scale(content)
            content = layer(content, query_pos, reference, memory, levels, groups)
            contents.append(content)
            refined.append((head(content) + inverse_sigmoid(boxes, ANCHOR_EPS)).sigmoid())
            boxes = refined[-1].detach()
        return torch.stack(contents), torch.stack(refined)


class DabDeformableDetr(DeformableDetector):
    """DAB-Deformable-DETR with ``config.num_groups`` groups; with one group it is the base model."""

    group_parameters = ("tgt_embed.weight", "refpoint_embed.weight")  # group-major rows
    config: DabDeformableDetrConfig

    def __init__(self, config: DabDeformableDetrConfig):
        super().__init__(config, position_offset=-0.5)
        dim, layers = config.d_model, config.decoder_layers
        self.decoder = DabDeformableDecoder(config)
        self.tgt_embed = nn.Embedding(config.num_groups * config.num_queries, dim)
        self.refpoint_embed = nn.Embedding(config.num_groups * config.num_queries, 4)
        self.class_embed = nn.ModuleList(nn.Linear(dim, config.num_classes) for _ in range(layers))
        self.bbox_embed = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(layers))
        initialize_deformable(self.decoder)
        initialize_heads(self.class_embed, self.bbox_embed)
        nn.init.constant_(
            self.bbox_embed.get_parameter("0.layers.2.bias")[2:], -2
        )  # the first layer makes the anchors smaller

    def decode(
        self,
        memory: tuple[Tensor, Levels],
        groups: QueryGroups,
        first: int = 0,
        targets: PackedTargets | None = None,
    ) -> DetectorOutput:
        """See :meth:`Detector.decode`."""
        tokens, levels = memory
        content = group_rows(self.tgt_embed.weight, groups, first).expand(tokens.shape[0], -1, -1)
        anchors = group_rows(self.refpoint_embed.weight, groups, first).sigmoid()
        contents, boxes = self.decoder(content, anchors, tokens, levels, groups, self.bbox_embed)
        logits = torch.stack([head(layer) for head, layer in zip(self.class_embed, contents, strict=True)])
        return DetectorOutput(logits, boxes, groups)

    def query_positions(self) -> Tensor:
        """See :meth:`Detector.query_positions`."""
        return self.refpoint_embed.weight[:, :2].float().sigmoid()
