"""The set prediction loss over all decoder layers, images and groups at once."""

from collections.abc import Mapping
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..boxes import aligned_generalized_box_iou, cxcywh_to_xyxy
from ..groups import QueryGroups
from ..targets import PackedTargets
from .matcher import GroupMatcher, Matching

__all__ = ["SetCriterion"]


class Predictions(Protocol):
    """What the criterion needs of a model's output; see ``models.DetectorOutput``."""

    logits: Tensor  # [layers, B, K * N, C]
    boxes: Tensor  # [layers, B, K * N, 4]
    groups: QueryGroups


class SetCriterion(nn.Module):
    """Sigmoid focal loss, L1 loss and generalised IoU loss of the matched boxes.

    Each group is matched one-to-one and the loss is the mean over groups (Group DETR, section 3.2): sums are divided by
    K times the number of boxes, averaged over processes and at least 1, as in the original repositories. All layers,
    images and groups take part in one call of each op, every tensor has a shape that the host knows, and nothing waits
    for the device.

    Args:
        matcher: matches queries to targets.
        class_loss, l1_loss, giou_loss: weights of the three losses in the total.
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
        matcher: GroupMatcher,
        *,
        class_loss: float = 2.0,
        l1_loss: float = 5.0,
        giou_loss: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.matcher = matcher
        self.weights: Mapping[str, float] = {"loss_ce": class_loss, "loss_bbox": l1_loss, "loss_giou": giou_loss}
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, out: Predictions, targets: PackedTargets) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            out: predictions of all layers; only ``logits``, ``boxes`` and ``groups`` are read.
            targets: of the same images, on the same device.

        Returns:
            Scalars under DETR's names, unweighted: ``loss_ce``, ``loss_bbox`` and ``loss_giou`` of the last layer, with
            ``_0``, ``_1``, ... appended for the other layers, and ``loss``, the weighted sum of all.
        """
        logits, boxes = out.logits.float(), out.boxes.float()
        matching = self.matcher(logits.detach(), boxes.detach(), targets, out.groups)
        normalizer = self._count_boxes(targets) * out.groups.num_groups
        per_layer = {"loss_ce": self._class_loss(logits, targets, matching, out.groups) / normalizer}
        per_layer["loss_bbox"], per_layer["loss_giou"] = (
            loss / normalizer for loss in self._box_losses(boxes, targets, matching, out.groups)
        )
        losses = {}
        last = len(logits) - 1
        for name, values in per_layer.items():
            for layer, value in enumerate(values.unbind()):
                losses[name if layer == last else f"{name}_{layer}"] = value
        losses["loss"] = sum(self.weights[name] * values.sum() for name, values in per_layer.items())
        return losses

    @staticmethod
    def _count_boxes(targets: PackedTargets) -> Tensor:
        """Boxes of the batch, averaged over processes, at least 1."""
        count = targets.num_targets.sum().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1)

    def _class_loss(self, logits: Tensor, targets: PackedTargets, matching: Matching, groups: QueryGroups) -> Tensor:
        """Focal loss of every layer, summed over images, queries and classes: ``[layers]``.

        Nearly all entries are negative, so the sum takes every entry as negative and then corrects the matched ones.
        """
        total = self._negative_focal(logits).flatten(1).sum(1)
        labels = targets.labels.repeat(1, groups.num_groups)  # [B, K * T]
        queries = matching.queries  # [layers, B, K * T]
        index = queries * logits.shape[-1] + labels
        positive = logits.flatten(2).gather(2, index)
        correction = self._positive_focal(positive) - self._negative_focal(positive)
        return total + correction.where(matching.matched, 0).flatten(1).sum(1)

    def _positive_focal(self, logits: Tensor) -> Tensor:
        return self.alpha * (-logits).sigmoid() ** self.gamma * F.softplus(-logits)

    def _negative_focal(self, logits: Tensor) -> Tensor:
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)

    @staticmethod
    def _box_losses(
        boxes: Tensor, targets: PackedTargets, matching: Matching, groups: QueryGroups
    ) -> tuple[Tensor, Tensor]:
        """L1 and generalised IoU loss of every layer, summed over matched boxes: two of ``[layers]``."""
        predicted = boxes.gather(2, matching.queries[..., None].expand(-1, -1, -1, 4))  # [layers, B, K * T, 4]
        expected = targets.boxes.to(predicted.dtype).repeat(1, groups.num_groups, 1)
        l1 = (predicted - expected).abs().sum(-1)
        giou = aligned_generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))
        return tuple(loss.where(matching.matched, 0).flatten(1).sum(1) for loss in (l1, 1 - giou))
