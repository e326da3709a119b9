"""The op ``matching_cost``: what it costs to match each query to each target of its image."""

import torch
from torch import Tensor

from ..._library import define_op
from ...targets import PackedTargets, check_packed
from .._triton import register_triton
from .reference import matching_cost_reference


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    *,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Cost of every pair of a query and a target of the same image, as Conditional and Deformable DETR define it.

    ::

        cost = class_weight * (present - absent) + l1_weight * L1 - giou_weight * GIoU
        present = alpha * (1 - p)^gamma * -log(p)            p = sigmoid(logit of the target's class)
        absent = (1 - alpha) * p^gamma * -log(1 - p)

    The logarithms are computed from the logits, exactly also where p is 0 or 1 in floating point; the original matchers
    compute ``log(p + 1e-8)`` instead, so their costs differ where a logit is large. This is the matching loss of
    equations 2 and 3 of the Group DETR paper; it serves :func:`~groupdetr_fast.ops.linear_assignment`.

    Args:
        logits: ``[..., B, Q, C]`` class logits of the queries of B images; the leading dimensions are, for instance,
            decoder layers. Any strides.
        boxes: ``[..., B, Q, 4]`` their boxes, ``cxcywh`` as fractions of the image size. Any strides.
        targets: the ground truth of the B images, on the device of ``logits``.
        class_weight, l1_weight, giou_weight: weights of the three terms.
        alpha, gamma: parameters of the focal loss; ``gamma`` must not be negative.

    Returns:
        ``[..., B, T_max, Q]`` contiguous: float64 if ``logits`` or ``boxes`` are, else float32, in which lower
        precisions are computed too. Padding rows are 0. A NaN in a query or a target makes its costs NaN, as does a
        label outside ``[0, C)``; infinite inputs give costs that are not finite. ``linear_assignment`` avoids such
        pairs.

    The result is deterministic and has no gradient: call it under ``torch.no_grad()`` or on detached tensors.

    Raises:
        RuntimeError: if an input requires a gradient while gradients are enabled.
        TypeError: if ``logits`` or ``boxes`` are not floating point, or ``targets`` is not a ``PackedTargets``.
        ValueError: if a shape or a device does not fit, or ``gamma`` is negative.
    """
    _check(logits, boxes, targets, gamma)
    dtype = torch.float64 if torch.float64 in (logits.dtype, boxes.dtype) else torch.float32
    # Kernels convert half types as they read: few of the logits take part.
    converts_itself = dtype == torch.float32 and logits.dtype in (torch.float16, torch.bfloat16)
    return _op(
        logits if converts_itself else logits.to(dtype),
        boxes.to(dtype),
        targets.labels,
        targets.boxes.to(dtype),
        targets.num_targets,
        float(class_weight),
        float(l1_weight),
        float(giou_weight),
        float(alpha),
        float(gamma),
    )


def _check(logits: Tensor, boxes: Tensor, targets: PackedTargets, gamma: float) -> None:
    check_packed(targets)
    for name, value in (("logits", logits), ("boxes", boxes)):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if logits.dim() < 3 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., B, Q, C] with C at least 1, got {list(logits.shape)}")
    if boxes.shape != (*logits.shape[:-1], 4):
        raise ValueError(f"boxes must have shape {[*logits.shape[:-1], 4]}, as logits have, got {list(boxes.shape)}")
    if logits.shape[-3] != targets.batch_size:
        raise ValueError(f"logits are of {logits.shape[-3]} images, but targets of {targets.batch_size}")
    targets.check_labels(logits.shape[-1])
    for name, device in (("boxes", boxes.device), ("targets", targets.device)):
        if device != logits.device:
            raise ValueError(f"{name} must lie on the device of logits, {logits.device}, got {device}")
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    if torch.is_grad_enabled() and (logits.requires_grad or boxes.requires_grad or targets.boxes.requires_grad):
        raise RuntimeError("matching_cost has no gradient: call it under torch.no_grad() or on detached tensors")


def _fake(
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
    return boxes.new_empty((*logits.shape[:-2], target_labels.shape[-1], logits.shape[-2]))


define_op(
    "matching_cost(Tensor logits, Tensor boxes, Tensor target_labels, Tensor target_boxes, Tensor num_targets, "
    "float class_weight, float l1_weight, float giou_weight, float alpha, float gamma) -> Tensor",
    reference=matching_cost_reference,
    fake=_fake,
    public=True,
)
_op = torch.ops.groupdetr_fast.matching_cost.default
register_triton("matching_cost", f"{__package__}.triton_kernels", "forward")
