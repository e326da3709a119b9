"""What ``sigmoid_focal_loss`` means, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._reference import gradients

# What a row of target_classes holds besides classes.
NO_OBJECT = -1  # target class of a query that must predict nothing
IGNORED = -2  # target class of a query that has no class loss


def sigmoid_focal_loss_reference(logits: Tensor, target_classes: Tensor, alpha: float, gamma: float) -> Tensor:
    """See :func:`groupdetr_fast.ops.sigmoid_focal_loss`."""
    num_classes = logits.shape[-1]
    ignored = target_classes == IGNORED  # [..., Q]
    unknown = (target_classes < IGNORED) | (target_classes >= num_classes)  # [..., Q]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(ignored.unsqueeze(-1), 0)  # NaN times 0 is NaN
    log_p, log_not_p = logsigmoid(logits), logsigmoid(-logits)
    # Powers of probabilities by their logarithms: the derivative of sigmoid()**gamma is inexact where p is near 1.
    if_present = alpha * (gamma * log_not_p).exp() * -log_p
    if_absent = (1 - alpha) * (gamma * log_p).exp() * -log_not_p
    present = target_classes.unsqueeze(-1) == torch.arange(num_classes, device=logits.device)  # [..., Q, C]
    loss = torch.where(present, if_present, if_absent).sum(-1)  # [..., Q]
    weight = torch.ones_like(loss).masked_fill(ignored, 0).masked_fill(unknown, torch.nan)
    return (loss * weight).sum(-1)


def sigmoid_focal_loss_backward_reference(
    grad_out: Tensor, logits: Tensor, target_classes: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The gradient of logits."""
    (grad,) = gradients(lambda x: sigmoid_focal_loss_reference(x, target_classes, alpha, gamma), grad_out, logits)
    return grad
