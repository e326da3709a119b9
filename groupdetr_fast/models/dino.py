"""DINO (Zhang et al., ICLR 2023), 4-scale, with groups of queries.

Image -> backbone -> four feature levels -> deformable encoder -> query selection -> decoder. Each group has encoder
heads of its own, which choose the tokens whose boxes its queries start from; the contents of the queries are learned.
Decoder layers refine the boxes, and a layer's boxes also teach the layer before ("look forward twice"). In training,
noised objects of the ground truth stand in front of the sequence as contrastive denoising queries. Only query selection
and decoder self-attention know about groups.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups import QueryGroups
from ..layers.deformable_attention import initialize_deformable
from ..layers.deformable_decoder import DeformableDecoderLayer, boxes_in_levels
from ..layers.deformable_levels import Levels
from ..layers.denoising import DenoisingQueries, make_denoising_queries
from ..layers.initialization import initialize_heads
from ..layers.mlp import ANCHOR_EPS, MLP, inverse_sigmoid
from ..layers.position import sine_position_embedding
from ..targets import PackedTargets
from .config import DenoisingConfig
from .deformable import DeformableConfig, DeformableDetector
from .detector import group_rows
from .output import DetectorOutput, EncoderOutput

__all__ = ["Dino", "DinoConfig", "token_anchors"]

ANCHOR_SIZE = 0.05  # of the tokens of the finest level, as a share of the image; it doubles with each level


@dataclass(frozen=True, kw_only=True)
class DinoConfig(DeformableConfig, DenoisingConfig):
    """Configuration of :class:`Dino`; the defaults are those of the 4-scale model with the paper's 3 groups.

    The repository's ``dn_label_noise_ratio`` is twice ``label_noise``.
    """

    num_groups: int = 3
    num_queries: int = 900
    label_noise: float = 0.25
    position_temperature: float = 20.0


class GroupLinear(nn.Module):
    """``num_groups`` linear layers, initialised as ``torch.nn.Linear``, computed for all groups at once.

    The tensors of the groups are stacked along the rows, group-major as learned queries are: with one group they are
    those of the plain layer, and a checkpoint with one group gives the first rows.

    Attributes:
        weight: ``[num_groups * out_features, in_features]``.
        bias: ``[num_groups * out_features]``.
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int):
        super().__init__()
        self.num_groups = num_groups
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_groups * out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_groups * out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor, groups: slice) -> Tensor:
        """``[B, k, n, in_features]``, k being the number of the chosen ``groups`` -> ``[B, k, n, out_features]``."""
        weight = self.weight.unflatten(0, (self.num_groups, -1))[groups]
        bias = self.bias.unflatten(0, (self.num_groups, 1, -1))[groups]
        return torch.einsum("bkni,koi->bkno", x, weight) + bias


class GroupLayerNorm(nn.Module):
    """``num_groups`` layer norms.

    Attributes:
        weight, bias: ``[num_groups * dim]``.
    """

    def __init__(self, num_groups: int, dim: int):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(num_groups * dim))
        self.bias = nn.Parameter(torch.zeros(num_groups * dim))

    def forward(self, x: Tensor, groups: slice) -> Tensor:
        """``[B, k, n, dim]``, k being the number of the chosen ``groups`` -> the same shape."""
        weight = self.weight.unflatten(0, (self.num_groups, 1, -1))[groups]
        bias = self.bias.unflatten(0, (self.num_groups, 1, -1))[groups]
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


class GroupMLP(nn.Module):
    """``num_groups`` perceptrons of ``num_layers`` linear layers with ReLU between them."""

    def __init__(self, num_groups: int, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(GroupLinear(num_groups, a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor, groups: slice) -> Tensor:
        """``[B, k, n, input_dim]``, k being the number of the chosen ``groups`` -> ``[B, k, n, output_dim]``."""
        for layer in self.layers[:-1]:
            x = layer(x, groups).relu()
        return self.layers[-1](x, groups)


def xavier_per_group(weight: Tensor, num_groups: int) -> None:
    """Initialise each group's rows of a matrix as Xavier's rule does a matrix of that size."""
    for rows in weight.detach().unflatten(0, (num_groups, -1)):
        nn.init.xavier_uniform_(rows)


class DinoDecoder(nn.Module):
    """Decoder layers that refine boxes, and what turns boxes into position embeddings."""

    def __init__(self, config: DinoConfig):
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
        self.norm = nn.LayerNorm(dim)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)

    def forward(
        self,
        content: Tensor,
        boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        groups: QueryGroups,
        bbox_embed: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: ``[B, L, d]``.
            boxes: ``[B, L, 4]`` ``cxcywh`` in [0, 1], the anchors.
            memory: ``[B, S, d]``, output of the encoder.
            levels: where the S tokens lie.
            groups: how the L queries fall into groups.
            bbox_embed: the box head, which predicts how a layer moves the boxes.

        Returns:
            Contents after every layer ``[layers, B, L, d]``, and the boxes that entered every layer
            ``[layers, B, L, 4]``.
        """
        outputs, entered = [], [boxes]
        for index, layer in enumerate(self.layers):
            reference = boxes_in_levels(boxes, levels)
            # As in the original repository, the embedding is that of the boxes in units of the first, padded level.
            query_pos = self.ref_point_head(sine_position_embedding(reference[:, :, 0], content.shape[-1]))
            content = layer(content, query_pos, reference, memory, levels, groups)
            outputs.append(self.norm(content))
            if index < len(self.layers) - 1:
                moved = (bbox_embed(content) + inverse_sigmoid(boxes, ANCHOR_EPS)).sigmoid()
                entered.append(moved)  # the box that the next layer predicts reaches back to this layer,
                boxes = moved.detach()  # the attention of the next layer does not
        return torch.stack(outputs), torch.stack(entered)


class Dino(DeformableDetector):
    """DINO with ``config.num_groups`` groups; with one group it is the base model."""

    group_parameters = (  # group-major rows; all other parameters serve every group
        "tgt_embed.weight",
        "enc_output.weight",
        "enc_output.bias",
        "enc_output_norm.weight",
        "enc_output_norm.bias",
        "enc_out_class_embed.weight",
        "enc_out_class_embed.bias",
        *(f"enc_out_bbox_embed.layers.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")),
    )
    config: DinoConfig

    def __init__(self, config: DinoConfig):
        super().__init__(config, position_offset=0.0)
        dim, groups = config.d_model, config.num_groups
        self.decoder = DinoDecoder(config)
        self.tgt_embed = nn.Embedding(groups * config.num_queries, dim)
        self.label_enc = nn.Embedding(config.num_classes + 1, dim)  # the repository's last row is not used either
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.enc_output = GroupLinear(groups, dim, dim)
        self.enc_output_norm = GroupLayerNorm(groups, dim)
        self.enc_out_class_embed = GroupLinear(groups, dim, config.num_classes)
        self.enc_out_bbox_embed = GroupMLP(groups, dim, dim, 4, 3)
        initialize_deformable(self.decoder)
        initialize_heads((self.class_embed, self.enc_out_class_embed), (self.bbox_embed, self.enc_out_bbox_embed))
        for weight in (self.tgt_embed.weight, self.enc_output.weight):
            xavier_per_group(weight, groups)

    def decode(
        self,
        memory: tuple[Tensor, Levels],
        groups: QueryGroups,
        first: int = 0,
        targets: PackedTargets | None = None,
    ) -> DetectorOutput:
        """See :meth:`Detector.decode`; the output also has the predictions of the selected tokens.

        Raises:
            ValueError: if the images have fewer tokens than a group has queries.
        """
        tokens, levels = memory
        encoder = self._select_queries(tokens, levels, groups, first)
        content = group_rows(self.tgt_embed.weight, groups, first).expand(tokens.shape[0], -1, -1)
        boxes = encoder.boxes.detach()
        denoising = None if targets is None else self._denoising_queries(targets, groups)
        if denoising is not None:
            content = torch.cat((denoising.content(self.label_enc), content), dim=1)
            boxes = torch.cat((denoising.anchors.sigmoid().to(boxes.dtype), boxes), dim=1)
        elif self.training:
            # DistributedDataParallel waits for a gradient of every parameter, also where a batch has no objects.
            content = content + 0 * self.label_enc.weight[0]
        sequence = groups if denoising is None else denoising.groups
        outputs, entered = self.decoder(content, boxes, tokens, levels, sequence, self.bbox_embed)
        boxes = (self.bbox_embed(outputs) + inverse_sigmoid(entered, ANCHOR_EPS)).sigmoid()
        return DetectorOutput.from_sequence(self.class_embed(outputs), boxes, groups, denoising, encoder)

    def _denoising_queries(self, targets: PackedTargets, groups: QueryGroups) -> DenoisingQueries | None:
        config = self.config
        return make_denoising_queries(
            targets,
            groups,
            num_classes=config.num_classes,
            number=config.denoising_queries,
            label_noise=config.label_noise,
            box_noise=config.box_noise,
            contrastive=True,
            scope=config.denoising_scope,
        )

    def _select_queries(self, memory: Tensor, levels: Levels, groups: QueryGroups, first: int) -> EncoderOutput:
        """Mixed query selection (section 3.4): each group takes the tokens whose class its own heads are surest of.

        All tokens are scored without a gradient; what a group chose is then computed again with one. The gradient is
        the same, as none flows through the choice, and the memory is that of the queries instead of all tokens.

        Args:
            memory: ``[B, S, d]``, output of the encoder.
            levels: where the S tokens lie.
            groups: how the K * N matching queries fall into groups.
            first: the first of the K groups among those of the model.

        Returns:
            The predictions of the chosen tokens, one per matching query.
        """
        anchors, valid = token_anchors(levels)  # [B or 1, S, 4], [B or 1, S]
        # Tokens without an anchor take part as zeros, as in the original repository; trained heads score them low.
        tokens = memory.masked_fill(~valid[..., None], 0)
        chosen = self._best_tokens(tokens, groups, first).flatten(1)[..., None]  # [B, K * N, 1]
        anchors = anchors.expand(tokens.shape[0], -1, -1).gather(1, chosen.expand(-1, -1, 4))
        rows = tokens.gather(1, chosen.expand(-1, -1, tokens.shape[-1]))
        rows = rows.unflatten(1, (groups.num_groups, -1))  # [B, K, N, d]
        heads = slice(first, first + groups.num_groups)
        rows = self._encoder_features(rows, heads)
        moves = self.enc_out_bbox_embed(rows, heads).flatten(1, 2)
        return EncoderOutput(self.enc_out_class_embed(rows, heads).flatten(1, 2), (moves + anchors).sigmoid())

    @torch.no_grad()
    def _best_tokens(self, tokens: Tensor, groups: QueryGroups, first: int) -> Tensor:
        """Indices of the N tokens that each group chooses, ``[B, K, N]``."""
        if tokens.shape[1] < groups.queries_per_group:
            raise ValueError(
                f"images must have at least num_queries={groups.queries_per_group} tokens, these have {tokens.shape[1]}"
            )
        scores = []
        for group in range(first, first + groups.num_groups):  # one at a time, as all tokens are many
            heads = slice(group, group + 1)
            features = self._encoder_features(tokens[:, None], heads)
            scores.append(self.enc_out_class_embed(features, heads).amax(-1))  # [B, 1, S]
        return torch.cat(scores, dim=1).topk(groups.queries_per_group).indices

    def _encoder_features(self, tokens: Tensor, heads: slice) -> Tensor:
        """``[B, k, n, d]`` -> ``[B, k, n, d]``, each of the k groups by its own layers."""
        return self.enc_output_norm(self.enc_output(tokens, heads), heads)


def token_anchors(levels: Levels) -> tuple[Tensor, Tensor]:
    """The box that each token stands for in two-stage detectors (Deformable DETR, appendix A.4).

    Returns:
        Anchors ``[B or 1, S, 4]`` ``cxcywh`` before the sigmoid, and ``[B or 1, S]`` bool, which tokens have one:
        padding and tokens at the very border have none, and infinity instead.
    """
    sizes = [
        torch.full((height * width,), ANCHOR_SIZE * 2**level, device=levels.centers.device)
        for level, (height, width) in enumerate(levels.shapes)
    ]
    size = torch.cat(sizes)[:, None].expand_as(levels.centers)
    boxes = torch.cat((levels.centers, size), dim=-1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if levels.padding is not None:
        valid = valid & ~levels.padding
    return boxes.logit().where(valid[..., None], torch.inf), valid
