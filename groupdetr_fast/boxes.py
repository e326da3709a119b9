"""Box formats, IoU and generalised IoU.

Two formats occur in this package: ``cxcywh`` (centre, width, height), which models predict and losses use, normalised
to [0, 1] by the image size, and ``xyxy`` (two corners), which metrics use.
"""

import torch
from torch import Tensor

__all__ = [
    "aligned_generalized_box_iou",
    "box_area",
    "cxcywh_to_xyxy",
    "masks_to_xyxy",
    "pairwise_generalized_box_iou",
    "xyxy_to_cxcywh",
]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes ``[..., 4]`` from centre format to corner format."""
    center, size = boxes[..., :2], boxes[..., 2:]
    half = size / 2
    return torch.cat((center - half, center + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes ``[..., 4]`` from corner format to centre format."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area ``[...]`` of ``xyxy`` boxes ``[..., 4]``; negative where exactly one side is inverted."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return width * height


def pairwise_generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of every pair: ``xyxy`` boxes ``[..., N, 4]`` and ``[..., M, 4]`` -> ``[..., N, M]``.

    Rezatofighi et al. 2019. Two empty boxes at one place have IoU 0 and an empty hull: their result is 0, not NaN.
    """
    return aligned_generalized_box_iou(first.unsqueeze(-2), second.unsqueeze(-3))


def aligned_generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of corresponding ``xyxy`` boxes: ``[..., 4]`` and ``[..., 4]`` (broadcast) -> ``[...]``."""
    overlap = (first[..., 2:].minimum(second[..., 2:]) - first[..., :2].maximum(second[..., :2])).clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = box_area(first) + box_area(second) - intersection
    hull_size = first[..., 2:].maximum(second[..., 2:]) - first[..., :2].minimum(second[..., :2])
    hull = hull_size[..., 0] * hull_size[..., 1]
    return _safe_divide(intersection, union) - _safe_divide(hull - union, hull)


def _safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, 0 (with zero gradient) where the denominator is 0."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)


def masks_to_xyxy(masks: Tensor) -> Tensor:
    """The boxes ``[N, 4]``, ``xyxy`` from edge to edge of the pixels, around masks ``[N, H, W]``; 0 where empty."""
    sides = []
    for along in (masks.any(1), masks.any(2)):  # columns, rows
        size = along.shape[1]
        steps = torch.arange(size, device=masks.device)
        first = torch.where(along, steps, size).amin(1)
        last = torch.where(along, steps + 1, 0).amax(1)
        sides.append((torch.minimum(first, last), last))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), dim=1).float()
