"""DAB-DETR (Liu et al., ICLR 2022) with groups of queries.

Conditional DETR whose queries are boxes. Each query is one learned anchor ``(x, y, w, h)``: its sine embedding gives
the query's position embedding, its width and height modulate cross-attention, and every decoder layer moves it, by the
one box head that all layers share. Only decoder self-attention knows about groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..groups import QueryGroups
from ..layers.conditional_decoder import ConditionalDecoderLayer, Memory
from ..layers.denoising import DenoisingQueries
from ..layers.initialization import initialize_heads, initialize_matrices
from ..layers.mlp import ANCHOR_EPS, MLP, inverse_sigmoid
from ..layers.position import sine_position_embedding
from ..targets import PackedTargets
from .config import DetectorConfig, check_temperature
from .detector import group_rows
from .output import DetectorOutput
from .single_level import SingleLevelDetr

__all__ = ["DabDetr", "DabDetrConfig"]


@dataclass(frozen=True, kw_only=True)
class DabDetrConfig(DetectorConfig):
    """Configuration of :class:`DabDetr`; the defaults are those of the paper with 11 groups.

    Attributes:
        position_temperature: base of the wave lengths of the image's position embedding; that of anchors is 10000.
    """

    position_temperature: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.position_temperature)


class DabDecoder(nn.Module):
    """Decoder layers that refine anchors, and what turns anchors into position embeddings."""

    def __init__(self, config: DabDetrConfig):
        super().__init__()
        dim = config.d_model
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(
                dim,
                config.num_heads,
                config.dim_feedforward,
                config.dropout,
                first=index == 0,
                activation=nn.PReLU,
            )
            for index in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.ref_anchor_head = MLP(dim, dim, 2, 2)

    def forward(
        self, content: Tensor, anchors: Tensor, memory: Memory, groups: QueryGroups, bbox_embed: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: ``[B, L, d]``.
            anchors: ``[B or 1, L, 4]`` before the sigmoid.
            memory: the image.
            groups: how the L queries fall into groups.
            bbox_embed: the box head, which predicts how far to move anchors before the sigmoid.

        Returns:
            Contents after every layer ``[layers, B, L, d]``, and the anchors that entered every layer
            ``[layers, B, L, 4]``, after the sigmoid.
        """
        dim = content.shape[-1]
        anchors = anchors.sigmoid()
        outputs, entered = [], [anchors.expand(content.shape[0], -1, -1)]
        for index, layer in enumerate(self.layers):
            sine = sine_position_embedding(anchors, dim)  # of y and x, then of w and h
            query_sine = sine[..., :dim] if index == 0 else sine[..., :dim] * self.query_scale(content)
            query_sine = self._modulate(query_sine, content, anchors)
            content = layer(content, self.ref_point_head(sine), query_sine, memory, groups)
            outputs.append(self.norm(content))
            if index < len(self.layers) - 1:
                moved = (bbox_embed(content) + inverse_sigmoid(anchors, ANCHOR_EPS)).sigmoid()
                entered.append(moved)  # the box that the next layer predicts reaches back to this layer,
                anchors = moved.detach()  # the attention of the next layer does not
        return torch.stack(outputs), torch.stack(entered)

    def _modulate(self, sine: Tensor, content: Tensor, anchors: Tensor) -> Tensor:
        """Scale the parts of y and x by predicted over actual height and width (modulated attention, section 4.4)."""
        ratio = self.ref_anchor_head(content).sigmoid() / anchors[..., 2:]  # [B, L, 2]: of the width, of the height
        return (sine.unflatten(-1, (2, -1)) * ratio.flip(-1)[..., None]).flatten(-2)


class DabDetr(SingleLevelDetr):
    """DAB-DETR with ``config.num_groups`` groups; with one group it is the base model."""

    group_parameters = ("refpoint_embed.weight",)  # group-major rows; all other parameters serve every group
    config: DabDetrConfig

    def __init__(self, config: DabDetrConfig):
        super().__init__(
            config, activation=nn.PReLU, scale_position=True, position_temperature=config.position_temperature
        )
        dim = config.d_model
        self.decoder = DabDecoder(config)
        self.refpoint_embed = nn.Embedding(config.num_groups * config.num_queries, 4)
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        initialize_matrices(self.encoder, self.decoder)
        initialize_heads([self.class_embed], [self.bbox_embed])

    def decode(
        self, memory: Memory, groups: QueryGroups, first: int = 0, targets: PackedTargets | None = None
    ) -> DetectorOutput:
        """See :meth:`Detector.decode`."""
        anchors = group_rows(self.refpoint_embed.weight, groups, first)
        content, anchors, denoising = self._queries(anchors, groups, memory.tokens.shape[0], targets)
        sequence = groups if denoising is None else denoising.groups
        outputs, entered = self.decoder(content, anchors, memory, sequence, self.bbox_embed)
        boxes = (self.bbox_embed(outputs) + inverse_sigmoid(entered, ANCHOR_EPS)).sigmoid()
        return DetectorOutput.from_sequence(self.class_embed(outputs), boxes, groups, denoising)

    def query_positions(self) -> Tensor:
        """See :meth:`Detector.query_positions`."""
        return self.refpoint_embed.weight[:, :2].float().sigmoid()

    def _queries(
        self, anchors: Tensor, groups: QueryGroups, batch_size: int, targets: PackedTargets | None
    ) -> tuple[Tensor, Tensor, DenoisingQueries | None]:
        """What the decoder starts from.

        Args:
            anchors: ``[1, Q, 4]``, of the matching queries.
            groups: how the Q matching queries fall into groups.
            targets: what to make denoising queries from; None for none. Not used: this model has no denoising queries.

        Returns:
            Contents ``[B, L, d]`` and anchors ``[B or 1, L, 4]`` of the sequence, and the denoising queries in it.
        """
        return anchors.new_zeros(batch_size, groups.length, self.config.d_model), anchors, None
