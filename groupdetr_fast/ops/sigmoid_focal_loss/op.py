"""The op ``sigmoid_focal_loss``: the class loss of all queries, summed per image."""

from typing import Any

import torch
from torch import Tensor

from ..._eager import EagerOp
from ..._library import block_double_backward, define_op
from .._triton import register_triton
from .reference import sigmoid_focal_loss_backward_reference, sigmoid_focal_loss_reference

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sigmoid_focal_loss(logits: Tensor, target_classes: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every query and class (Lin et al. 2017, equation 5), summed over the queries and classes.

    ::

        alpha * (1 - p)^gamma * -log(p)            for the class of a query's target, p = sigmoid(logit)
        (1 - alpha) * p^gamma * -log(1 - p)        for every other class

    Forward reads the logits once and backward reads them once more, to write their gradient; neither allocates
    anything else of their size.

    Args:
        logits: ``[..., Q, C]`` of Q queries, float32, float64, float16 or bfloat16. The leading dimensions are, for
            instance, decoder layers and images. Any strides.
        target_classes: ``[..., Q]`` int64: the class of the target that a query is matched to, in ``[0, C)``; NO_OBJECT
            (-1) for a query without one, whose classes are all absent; IGNORED (-2) for a query to ignore, which adds
            nothing and whose gradient is 0 whatever its logits are. Any other value makes the loss and the gradient of
            its row NaN.
        alpha: weight of the classes that are present; the others have ``1 - alpha``.
        gamma: exponent of the focal factor; not negative.

    Returns:
        ``[...]`` float64 if ``logits`` are, else float32, in which lower precisions are computed too.

    The loss is exact also where p is 0 or 1 in floating point; a NaN logit makes the loss of its image and its own
    gradient NaN. Forward and backward are deterministic. There is no double backward.

    Raises:
        TypeError: if a dtype is none of these.
        ValueError: if a shape or a device does not fit, or ``gamma`` is negative.
    """
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits must be float32, float64, float16 or bfloat16, got {logits.dtype}")
    if target_classes.dtype != torch.int64:
        raise TypeError(f"target_classes must be int64, got {target_classes.dtype}")
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape [..., Q, C], got {list(logits.shape)}")
    if target_classes.shape != logits.shape[:-1]:
        expected = f"{list(logits.shape[:-1])}, that of logits without the classes"
        raise ValueError(f"target_classes must have shape {expected}, got {list(target_classes.shape)}")
    if target_classes.device != logits.device:
        raise ValueError(
            f"target_classes must lie on the device of logits, {logits.device}, got {target_classes.device}"
        )
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    return _op(logits, target_classes, float(alpha), float(gamma))


def _fake(logits: Tensor, target_classes: Tensor, alpha: float, gamma: float) -> Tensor:
    return logits.new_empty(logits.shape[:-2], dtype=torch.promote_types(logits.dtype, torch.float32))


def _fake_backward(grad_out: Tensor, logits: Tensor, target_classes: Tensor, alpha: float, gamma: float) -> Tensor:
    return logits.new_empty(logits.shape)


define_op(
    "sigmoid_focal_loss(Tensor logits, Tensor target_classes, float alpha, float gamma) -> Tensor",
    reference=sigmoid_focal_loss_reference,
    fake=_fake,
    public=True,
)
define_op(
    "sigmoid_focal_loss_backward(Tensor grad_out, Tensor logits, Tensor target_classes, float alpha, float gamma) "
    "-> Tensor",
    reference=sigmoid_focal_loss_backward_reference,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, target_classes, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(logits, target_classes)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = _op_backward(grad_out, *ctx.saved_tensors, ctx.alpha, ctx.gamma)
    no_grad_target_classes = no_grad_alpha = no_grad_gamma = None
    return grad_logits, no_grad_target_classes, no_grad_alpha, no_grad_gamma


_op = EagerOp("sigmoid_focal_loss")
_op_backward = EagerOp("sigmoid_focal_loss_backward")
_op.register_autograd(setup_context=_setup_context, backward=_backward)
block_double_backward("sigmoid_focal_loss_backward")
register_triton("sigmoid_focal_loss", f"{__package__}.triton_kernels", "forward")
register_triton("sigmoid_focal_loss_backward", f"{__package__}.triton_kernels", "backward")
