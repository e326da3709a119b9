"""What transformers computes as the loss of its DETRs, for all layers, images and groups at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..detr import HungarianMatcher, SetCriterion

__all__ = ["DetectionLoss", "LwDetrLoss"]


class _ImageLoss(SetCriterion):
    """Counts objects as transformers does, in place of DETR's rule: by a score above one half."""

    @staticmethod
    def _predicts_object(logits: Tensor) -> Tensor:
        return logits.amax(-1) > 0


@dataclass
class DetectionLoss:
    """The loss of Conditional DETR, DAB-DETR and Deformable DETR, with the signature that transformers' losses have.

    The losses are means over groups; with one group they are those of transformers.

    Args:
        queries_per_group: N; None takes all queries as one group.
    """

    queries_per_group: int | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        pred_boxes: Tensor,
        config: PretrainedConfig,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        enc_outputs_class: Tensor | None = None,
        enc_outputs_coord: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        """The weighted sum of the losses, the losses by name, and the outputs of all layers but the last."""
        weights = {
            "loss_ce": self._class_weight(config),
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        criterion = _ImageLoss(
            config.num_labels,
            HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            weights,
            focal_alpha=config.focal_alpha,
            group_detr=logits.shape[1] // self._size_of_groups(logits, config),
            **self._options(),
        )
        outputs = {"pred_logits": logits, "pred_boxes": pred_boxes}
        auxiliary = None
        if config.auxiliary_loss:
            layers = list(zip(outputs_class[:-1], outputs_coord[:-1], strict=True))
            outputs["aux_outputs"] = [{"pred_logits": a, "pred_boxes": b} for a, b in layers]
            auxiliary = [{"logits": a, "pred_boxes": b} for a, b in layers]
        outputs |= self._encoder_outputs(enc_outputs_class, enc_outputs_coord)
        losses = criterion(outputs, [{"labels": label["class_labels"], "boxes": label["boxes"]} for label in labels])
        del losses["class_error"]  # transformers has none
        # "loss_ce_0" and "loss_ce_enc" weigh as "loss_ce"
        total = sum(
            weight * value for name, weight in weights.items() for key, value in losses.items() if key.startswith(name)
        )
        return total, losses, auxiliary

    def _size_of_groups(self, logits: Tensor, config: PretrainedConfig) -> int:
        return self.queries_per_group or logits.shape[1]

    def _class_weight(self, config: PretrainedConfig) -> float:
        return 1.0

    def _options(self) -> dict[str, Any]:
        """Of the criterion."""
        return {}

    def _encoder_outputs(self, logits: Tensor | None, boxes: Tensor | None) -> dict[str, Any]:
        """These detectors' losses leave the encoder's proposals out, also in two stages."""
        return {}


class LwDetrLoss(DetectionLoss):
    """The loss of LW-DETR and RF-DETR: aware of the IoU, of the encoder's proposals too, in groups of ``num_queries``.

    How many groups there are, the outputs say: K in training mode, one in evaluation mode. transformers' own loss
    takes ``config.group_detr`` groups in either mode, and so matches 300 queries of evaluation as 13 groups of 23.
    """

    def _size_of_groups(self, logits: Tensor, config: PretrainedConfig) -> int:
        return config.num_queries

    def _class_weight(self, config: PretrainedConfig) -> float:
        return config.class_loss_coefficient

    def _options(self) -> dict[str, Any]:
        return {"ia_bce_loss": True}

    def _encoder_outputs(self, logits: Tensor | None, boxes: Tensor | None) -> dict[str, Any]:
        return {"enc_outputs": {"pred_logits": logits, "pred_boxes": boxes}}
