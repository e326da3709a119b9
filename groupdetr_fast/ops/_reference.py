"""What the references of the ops share."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradients"]


def gradients(function: Callable[..., Tensor], grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients, contiguous, of ``function(*inputs)`` with respect to the inputs."""
    vjp = torch.func.vjp(function, *inputs)[1]
    return tuple(grad.contiguous() for grad in vjp(grad_out))
