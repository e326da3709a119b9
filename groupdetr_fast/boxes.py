"""Box formats, IoU and generalised IoU.

Two formats occur in this package: ``cxcywh`` (centre, width, height), which models predict and losses use, normalised
to [0, 1] by the image size, and ``xyxy`` (two corners), which metrics use.
"""

import torch
from torch import Tensor

__all__ = [
    "aligned_generalized_box_iou",
    "aligned_generalized_box_iou_of_centers",
    "box_area",
    "cxcywh_to_xyxy",
    "masks_to_xyxy",
    "pairwise_generalized_box_iou",
    "xyxy_to_cxcywh",
]


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes ``[..., 4]`` from centre format to corner format."""
    return torch.cat(_corners(boxes), dim=-1)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Top left and bottom right ``[..., 2]`` of boxes in centre format."""
    center, size = boxes.split(2, dim=-1)
    half = size / 2
    return center - half, center + half


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes ``[..., 4]`` from corner format to centre format."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area ``[...]`` of ``xyxy`` boxes ``[..., 4]``; negative where exactly one side is inverted."""
    top_left, bottom_right = boxes.split(2, dim=-1)
    return _product(bottom_right - top_left)


def pairwise_generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of every pair: ``xyxy`` boxes ``[..., N, 4]`` and ``[..., M, 4]`` -> ``[..., N, M]``.

    Rezatofighi et al. 2019. Two empty boxes at one place have IoU 0 and an empty hull: their result is 0, not NaN.
    """
    return aligned_generalized_box_iou(first.unsqueeze(-2), second.unsqueeze(-3))


def aligned_generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of corresponding ``xyxy`` boxes: ``[..., 4]`` and ``[..., 4]`` (broadcast) -> ``[...]``."""
    return _generalized_iou(first.split(2, dim=-1), second.split(2, dim=-1))


def aligned_generalized_box_iou_of_centers(first: Tensor, second: Tensor) -> Tensor:
    """The same of ``cxcywh`` boxes, bit for bit, with fewer operators than by :func:`cxcywh_to_xyxy`."""
    return _generalized_iou(_corners(first), _corners(second))


def _generalized_iou(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Of boxes by top left and bottom right. Written for few operators: on a GPU each is a launch or more."""
    overlap = (first[1].minimum(second[1]) - first[0].maximum(second[0])).clamp(min=0)
    intersection = _product(overlap)
    union = _product(first[1] - first[0]) + _product(second[1] - second[0]) - intersection
    hull = _product(first[1].maximum(second[1]) - first[0].minimum(second[0]))
    quotients = _safe_divide(torch.stack((intersection, hull - union)), torch.stack((union, hull)))
    iou, empty = quotients.unbind()
    return iou - empty


def _product(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)
    return width * height


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
