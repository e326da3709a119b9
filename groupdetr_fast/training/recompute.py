"""Trading time for memory: decoder layers whose activations are computed again in the backward pass."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_decoder_layers"]


def recompute_decoder_layers(model: nn.Module) -> None:
    """Let each layer of ``model.decoder.layers`` keep its inputs alone and run again in the backward pass.

    Gradients stay the same, also with dropout, whose random numbers are drawn again. Without gradients nothing changes.

    Raises:
        ValueError: if the model has no such layers.
    """
    layers = getattr(getattr(model, "decoder", None), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} has no decoder.layers that could be computed again")
    for layer in layers:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return run
