"""What ``matching_cost`` means, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...boxes import cxcywh_to_xyxy, pairwise_generalized_box_iou


def matching_cost_reference(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    num_targets: Tensor,
    class_weight: float,
    l1_weight: float,
    giou_weight: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    """See :func:`groupdetr_fast.ops.matching_cost`; the boxes have the dtype of the result."""
    num_classes = logits.shape[-1]
    labels = target_labels.clamp(0, num_classes - 1).unsqueeze(-1)  # [B, T, 1]
    labels = labels.expand(*logits.shape[:-2], -1, logits.shape[-2])  # [..., B, T, Q]
    logits = logits.transpose(-1, -2).gather(-2, labels).to(boxes.dtype)  # [..., B, T, Q]
    if_present = alpha * (-logits).sigmoid() ** gamma * -logsigmoid(logits)
    if_absent = (1 - alpha) * logits.sigmoid() ** gamma * -logsigmoid(-logits)
    focal = if_present - if_absent

    l1 = (target_boxes.unsqueeze(-2) - boxes.unsqueeze(-3)).abs().sum(-1)  # [..., B, T, Q]
    giou = pairwise_generalized_box_iou(cxcywh_to_xyxy(target_boxes), cxcywh_to_xyxy(boxes))  # [..., B, T, Q]

    cost = class_weight * focal + l1_weight * l1 - giou_weight * giou
    no_class = ((target_labels < 0) | (target_labels >= num_classes)).unsqueeze(-1)  # [B, T, 1]
    rows = torch.arange(target_labels.shape[-1], device=logits.device)
    padding = (rows >= num_targets.unsqueeze(-1)).unsqueeze(-1)  # [B, T, 1]
    return cost.masked_fill(no_class, torch.nan).masked_fill(padding, 0)
