"""Losses that are summed in passes, so that memory holds the activations of one pass.

The passes share nothing but some tensors, such as feature maps and parameters, and each asks at once for the gradients
of these and forgets its activations before the next begins. The backward pass of the sum, which autograd calls when it
gets there, only scales the gradients that were kept. To all that comes before and after, such as
DistributedDataParallel, accumulation and a GradScaler, the step is an ordinary one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["sum_in_passes"]

Run = Callable[[int, Sequence[Tensor]], Tensor]


def sum_in_passes(
    run: Run,
    passes: Sequence[int],
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    start: Tensor | float = 1.0,
) -> Tensor:
    """Sums of losses over passes, whose gradients are computed with them.

    Of the gradients that reach the sums only their part along the weights is used, which is all of it where the
    training loss is the weighted sum, times any factor.

    Args:
        run: one pass, called with an element of ``passes`` and with stand-ins for ``features``: ``[losses, 2]``, each
            loss and its weight in the training loss; the weights are the same in every pass.
        passes: what tells one pass from another; at least one.
        features: what the passes share and was computed before.
        parameters: leaves that the passes share; these ``run`` must use itself.
        start: scalar that the gradients inside of the passes begin with, such as the scale of a GradScaler: half types
            would lose small gradients. The gradients that leave do not depend on it.

    Returns:
        ``[losses]``. There is one backward pass through it: a second one raises RuntimeError.
    """
    return _Sum.apply(run, passes, start, torch.is_grad_enabled(), len(features), *features, *parameters)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        passes: Sequence[int],
        start: Tensor | float,
        with_gradients: bool,
        num_features: int,
        *shared: Tensor,
    ) -> Tensor:
        """``shared`` are ``num_features`` features, and the parameters."""
        ctx.gradients = [None] * len(shared)
        wanted = [index for index, part in enumerate(shared) if with_gradients and part.requires_grad]
        cut = [part.detach().requires_grad_(part.requires_grad) for part in shared[:num_features]]
        leaves = [(cut[index] if index < num_features else shared[index]) for index in wanted]
        sums = []
        for each in passes:
            with torch.set_grad_enabled(bool(wanted)):
                values, weights = run(each, cut).unbind(1)
                weights = weights.detach()
                weighted = (values * weights).sum() * start
            if wanted:
                with torch.autocast(values.device.type, enabled=False):  # as in any backward pass
                    found = list(torch.autograd.grad(weighted, leaves, allow_unused=True))
                for index in reversed(wanted):
                    ctx.gradients[index] = _add(ctx.gradients[index], found.pop())
            sums.append(values.detach())
            del values, weighted  # with the activations, before the next pass makes its own
        ctx.along = weights / (weights.square().sum() * start)
        return torch.stack(sums).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = (grad * ctx.along).sum()
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a step in passes has one backward pass: its gradients are gone after the first")
        no_grad = (None,) * 5
        return *no_grad, *(None if gradient is None else gradient * factor.to(gradient) for gradient in gradients)


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of two gradients, which may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second
