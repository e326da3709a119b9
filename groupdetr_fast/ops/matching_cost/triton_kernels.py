"""``matching_cost`` on NVIDIA GPUs: the three terms of same-image pairs in one pass over queries and targets."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_focal import class_probability, focal_factor
from .._triton_launch import Launch, flat_rows

_BLOCK_Q = 64
_LAUNCH = {"num_warps": 4, "num_stages": 1}
# These change from batch to batch; their divisors are not worth a compilation each.
_NOT_SPECIALIZED = ["images", "max_targets"]


@triton.jit
def _corners(box, stride, mask):
    """Centre, size and corners of boxes at ``box``, whose coordinates lie ``stride`` apart."""
    cx = tl.load(box, mask=mask, other=0.0)
    cy = tl.load(box + stride, mask=mask, other=0.0)
    width = tl.load(box + 2 * stride, mask=mask, other=0.0)
    height = tl.load(box + 3 * stride, mask=mask, other=0.0)
    return cx, cy, width, height, cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2


@triton.jit
def _safe_divide(numerator, denominator):
    """The quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return tl.where(zero, 0, numerator) / tl.where(zero, 1, denominator)


@triton.jit
def _class_costs(logit, CLASS_WEIGHT: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    present, absent, minus_log_present, minus_log_absent = class_probability(logit)
    if_present = focal_factor(absent, minus_log_absent, GAMMA) * minus_log_present
    if_absent = focal_factor(present, minus_log_present, GAMMA) * minus_log_absent
    return CLASS_WEIGHT * (ALPHA * if_present - (1 - ALPHA) * if_absent)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _matching_cost_kernel(
    cost,  # [P, T, Q]
    logits,  # [P, Q, C], problem p of image p % images
    boxes,  # [P, Q, 4]
    labels,  # [images, T]
    target_boxes,  # [images, T, 4]
    num_targets,  # [images]
    logits_stride_p,
    logits_stride_q,
    logits_stride_c,
    boxes_stride_p,
    boxes_stride_q,
    boxes_stride_c,
    images,
    max_targets,
    queries,
    classes,
    CLASS_WEIGHT: tl.constexpr,
    L1_WEIGHT: tl.constexpr,
    GIOU_WEIGHT: tl.constexpr,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # Programs that read the same logits follow one another.
    target_blocks = tl.cdiv(max_targets, BLOCK_T)
    query_blocks = tl.cdiv(queries, BLOCK_Q)
    program = tl.program_id(0)
    first_target = program % target_blocks * BLOCK_T
    q = program // target_blocks % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    problem = (program // target_blocks // query_blocks).to(tl.int64)
    image = problem % images
    t = first_target + tl.arange(0, BLOCK_T)
    count = tl.load(num_targets + image)
    is_query = q < queries
    is_target = (t < count) & (t < max_targets)

    result = tl.zeros([BLOCK_T, BLOCK_Q], cost.dtype.element_ty)
    if first_target < count:
        # Lanes of a warp run along the targets here: the classes of one query share a few cache lines.
        label = tl.load(labels + image * max_targets + t, mask=is_target, other=-1)
        has_class = (label >= 0) & (label < classes)
        row = logits + problem * logits_stride_p + q.to(tl.int64) * logits_stride_q
        logit = tl.load(
            row[:, None] + (label * logits_stride_c)[None, :], mask=is_query[:, None] & has_class[None, :], other=0.0
        ).to(cost.dtype.element_ty)  # [BLOCK_Q, BLOCK_T]
        # From here on along the queries, as the costs are stored.
        class_cost = tl.trans(_class_costs(logit, CLASS_WEIGHT, ALPHA, GAMMA))
        class_cost = tl.where(has_class[:, None], class_cost, float("nan"))

        target = target_boxes + (image * max_targets + t) * 4
        cx, cy, width, height, left, top, right, bottom = _corners(target[:, None], 1, is_target[:, None])
        query = boxes + problem * boxes_stride_p + q.to(tl.int64) * boxes_stride_q
        q_cx, q_cy, q_width, q_height, q_left, q_top, q_right, q_bottom = _corners(
            query[None, :], boxes_stride_c, is_query[None, :]
        )
        l1 = tl.abs(cx - q_cx) + tl.abs(cy - q_cy) + tl.abs(width - q_width) + tl.abs(height - q_height)
        overlap_width = tl.minimum(right, q_right) - tl.maximum(left, q_left)
        overlap_height = tl.minimum(bottom, q_bottom) - tl.maximum(top, q_top)
        intersection = tl.maximum(overlap_width, 0.0) * tl.maximum(overlap_height, 0.0)
        union = (right - left) * (bottom - top) + (q_right - q_left) * (q_bottom - q_top) - intersection
        hull_width = tl.maximum(right, q_right) - tl.minimum(left, q_left)
        hull_height = tl.maximum(bottom, q_bottom) - tl.minimum(top, q_top)
        hull = hull_width * hull_height
        giou = _safe_divide(intersection, union) - _safe_divide(hull - union, hull)
        result = tl.where(is_target[:, None], class_cost + (L1_WEIGHT * l1 - GIOU_WEIGHT * giou), 0.0)

    own_cost = cost + (problem * max_targets + t)[:, None] * queries + q[None, :]
    tl.store(own_cost, result, mask=(t < max_targets)[:, None] & is_query[None, :])


def forward(
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
    """Launch; the arguments are those of the operator. Leading dimensions that are no view of one are copied."""
    max_targets = target_labels.shape[1]
    cost = boxes.new_empty((*logits.shape[:-2], max_targets, logits.shape[-2]))
    if cost.numel() == 0:
        return cost
    logits, strides = flat_rows(logits)
    boxes, box_strides = flat_rows(boxes)
    settings = class_weight, l1_weight, giou_weight, alpha, gamma
    launch = _launch(logits.shape, strides, box_strides, target_labels.shape, cost.element_size(), *settings)
    targets = (target_labels, target_boxes, num_targets)
    launch(cost, logits, boxes, *(tensor.contiguous() for tensor in targets))
    return cost


@functools.lru_cache(maxsize=1024)
def _launch(
    shape: torch.Size,
    strides: tuple[int, ...],
    box_strides: tuple[int, ...],
    target_shape: torch.Size,
    element_size: int,
    *weights: float,
) -> Launch:
    *leading, queries, classes = shape
    block_t = _block_t(target_shape[1], element_size)
    blocks = math.prod(leading) * triton.cdiv(queries, _BLOCK_Q) * triton.cdiv(target_shape[1], block_t)
    names = ("CLASS_WEIGHT", "L1_WEIGHT", "GIOU_WEIGHT", "ALPHA", "GAMMA")
    settings = {**dict(zip(names, weights, strict=True)), "BLOCK_T": block_t, "BLOCK_Q": _BLOCK_Q, **_LAUNCH}
    return Launch(_matching_cost_kernel, blocks, (*strides, *box_strides, *target_shape, queries, classes), settings)


def _block_t(max_targets: int, element_size: int) -> int:
    """Targets of a program: at most 16, and 8 of costs in float64, since the registers do not hold 16."""
    return min(64 // element_size, triton.next_power_of_2(max_targets))
