"""Batch norm with fixed statistics and affine parameters, as one operator in each direction."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

__all__ = ["FrozenBatchNorm2d"]


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, with the same buffers; ``[B, C, H, W]`` -> the same shape, dtype and layout.

    torchvision's takes seven operators, of which two go over the whole map, and under autocast it leaves float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        if torch.is_grad_enabled() and x.requires_grad:
            return _FixedNorm.apply(x, *statistics, self.eps)
        return F.batch_norm(x, *statistics, eps=self.eps)


class _FixedNorm(torch.autograd.Function):
    """torch's own backward pass would keep ``x``, for gradients that nobody wants here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        scaled = F.batch_norm(grad, torch.zeros_like(var), var, weight, eps=ctx.eps)  # times weight / sqrt(var + eps)
        return scaled, None, None, None, None, None
