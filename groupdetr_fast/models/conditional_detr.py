"""Conditional DETR (Meng et al., ICCV 2021) with groups of queries.

Image -> backbone -> 1x1 projection -> encoder -> decoder -> class and box heads. Each query is one learned vector: it
gives the query's position embedding and, through ``ref_point_head``, a reference point. Cross-attention looks for
content around that point; the box head predicts an offset to it. Only decoder self-attention knows about groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..groups import QueryGroups
from ..layers.conditional_decoder import ConditionalDecoderLayer, Memory
from ..layers.initialization import initialize_heads, initialize_matrices
from ..layers.mlp import MLP, inverse_sigmoid
from ..layers.position import sine_position_embedding
from ..targets import PackedTargets
from .config import DetectorConfig
from .detector import group_rows
from .output import DetectorOutput
from .single_level import SingleLevelDetr

__all__ = ["ConditionalDetr", "ConditionalDetrConfig"]


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
        content = query_pos.new_zeros(memory.tokens.shape[0], *query_pos.shape[1:])
        outputs = []
        for index, layer in enumerate(self.layers):
            query_sine = sine if index == 0 else sine * self.query_scale(content)
            content = layer(content, query_pos, query_sine, memory, groups)
            outputs.append(self.norm(content))
        return torch.stack(outputs), reference


class ConditionalDetr(SingleLevelDetr):
    """Conditional DETR with ``config.num_groups`` groups; with one group it is the base model."""

    group_parameters = ("query_embed.weight",)  # group-major rows; all other parameters serve every group
    config: ConditionalDetrConfig

    def __init__(self, config: ConditionalDetrConfig):
        super().__init__(config)
        dim = config.d_model
        self.decoder = ConditionalDecoder(config)
        self.query_embed = nn.Embedding(config.num_groups * config.num_queries, dim)
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        initialize_matrices(self.encoder, self.decoder)
        initialize_heads([self.class_embed], [self.bbox_embed])

    def decode(
        self, memory: Memory, groups: QueryGroups, first: int = 0, targets: PackedTargets | None = None
    ) -> DetectorOutput:
        """See :meth:`Detector.decode`."""
        query_pos = group_rows(self.query_embed.weight, groups, first)
        outputs, reference = self.decoder(query_pos, memory, groups)
        offsets = self.bbox_embed(outputs)
        center = (offsets[..., :2] + inverse_sigmoid(reference.sigmoid())).sigmoid()
        boxes = torch.cat((center, offsets[..., 2:].sigmoid()), dim=-1)
        return DetectorOutput(self.class_embed(outputs), boxes, groups)

    def query_positions(self) -> Tensor:
        """See :meth:`Detector.query_positions`."""
        return self.decoder.ref_point_head(self.query_embed.weight).float().sigmoid()
