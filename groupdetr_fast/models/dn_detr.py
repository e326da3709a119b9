"""DN-DETR (Li et al., CVPR 2022) with groups of queries: DAB-DETR that also learns to undo noise.

In training, noised objects of the ground truth stand in front of the sequence as denoising queries. The content of a
query is the embedding of a class and one indicator: of the noised class and 1 for a denoising query, of the class
"unknown" and 0 for a matching query. Everything else is DAB-DETR.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..groups import QueryGroups
from ..layers.denoising import DenoisingQueries, make_denoising_queries
from ..targets import PackedTargets
from .config import DenoisingConfig
from .dab_detr import DabDetr, DabDetrConfig

__all__ = ["DnDetr", "DnDetrConfig"]


@dataclass(frozen=True, kw_only=True)
class DnDetrConfig(DabDetrConfig, DenoisingConfig):
    """Configuration of :class:`DnDetr`; the defaults are those of DN-DETR with 11 groups.

    The number of denoising groups follows from ``denoising_queries``, as in DINO and in the results of Group DETR
    (table 3); DN-DETR's own paper has five always.
    """


class DnDetr(DabDetr):
    """DN-DETR with ``config.num_groups`` groups; with one group it is the base model."""

    config: DnDetrConfig

    def __init__(self, config: DnDetrConfig):
        super().__init__(config)
        self.label_enc = nn.Embedding(config.num_classes + 1, config.d_model - 1)  # the last row is "unknown"

    def _queries(
        self, anchors: Tensor, groups: QueryGroups, batch_size: int, targets: PackedTargets | None
    ) -> tuple[Tensor, Tensor, DenoisingQueries | None]:
        unknown = self.label_enc.weight[-1]
        content = torch.cat((unknown, unknown.new_zeros(1))).expand(batch_size, groups.length, -1)
        if targets is None:
            return content, anchors, None
        config = self.config
        denoising = make_denoising_queries(
            targets,
            groups,
            num_classes=config.num_classes,
            number=config.denoising_queries,
            label_noise=config.label_noise,
            box_noise=config.box_noise,
            scope=config.denoising_scope,
        )
        if denoising is None:
            return content, anchors, None
        indicator = denoising.exists[..., None].to(content.dtype)
        noised = torch.cat((denoising.content(self.label_enc), indicator), dim=-1)
        content = torch.cat((noised, content), dim=1)
        anchors = torch.cat((denoising.anchors.to(anchors.dtype), anchors.expand(batch_size, -1, -1)), dim=1)
        return content, anchors, denoising
