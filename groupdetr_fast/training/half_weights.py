"""Weights in the half type of a step, cast all at once.

Autocast casts a weight where it is used, and the backward pass casts its gradient back: two kernels of a few
microseconds for each of hundreds of weights, a sixth of all that a step of a Conditional DETR R50 launches. Here all
weights are cast by one operator and all gradients by another. Every number stays the same, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

__all__ = ["CAST", "HalfWeights", "forward_precision"]

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Layers whose weights autocast casts in their forward passes. Not their subclasses, which may change the weights
# before, such as convolutions that standardise them.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.PReLU)


class HalfWeights:
    """Lets layers have weights that are cast already.

    A layer has them from the pass after the first one that calls it, if all those calls were under autocast. What stays
    as it is: subclasses, layers with hooks before their forward passes, such as those of ``spectral_norm``, and weights
    that are not float32. A model that uses ``layer.weight`` by itself gets the cast weight.

    Args:
        model: bare; its modules are looked up once.
        dtype: to which autocast would cast them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        # Layers that nothing is known of, and whether all calls so far were under autocast; None without a call.
        self._unknown: dict[nn.Module, bool | None] = {
            module: None for module in model.modules() if type(module) in CAST and not module._forward_pre_hooks
        }
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self._weights: dict[int, nn.Parameter] = {}  # in these places, by identity: some are in several

    def take(self, layers: Iterable[nn.Module]) -> None:
        """Let the weights of these be cast from now on."""
        for layer in layers:
            kept = layer._parameters
            found = ((name, kept.get(name)) for name in ("weight", "bias"))
            for name, weight in found:
                if weight is not None and weight.dtype is torch.float32:
                    self._places.append((kept, name, weight))
                    self._weights[id(weight)] = weight

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Inside, which is for a forward pass, layers have their weights cast.

        Gradients reach the parameters in float32. Frozen weights are cast, too, and get none.
        """
        hooks = [layer.register_forward_pre_hook(self._note) for layer in self._unknown]
        halves = self._halves()
        for kept, name, weight in self._places:
            kept[name] = halves[id(weight)]
        try:
            yield
        finally:
            for kept, name, weight in self._places:
                kept[name] = weight
            for hook in hooks:
                hook.remove()
            called = {layer: under for layer, under in self._unknown.items() if under is not None}
            self._unknown = {layer: None for layer in self._unknown if layer not in called}
            self.take(layer for layer, under in called.items() if under)

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        under = bool(inputs) and isinstance(inputs[0], Tensor) and torch.is_autocast_enabled(inputs[0].device.type)
        self._unknown[layer] = self._unknown[layer] is not False and under

    def _halves(self) -> dict[int, Tensor]:
        """By the identities of the weights."""
        trained = [weight for weight in self._weights.values() if weight.requires_grad]
        frozen = [weight for weight in self._weights.values() if not weight.requires_grad]
        with torch.no_grad():
            halves = cast_all(frozen, self.dtype)
        if trained:
            halves += _CastAll.apply(self.dtype, *trained)
        return {id(weight): half for weight, half in zip([*frozen, *trained], halves, strict=True)}


def forward_precision(
    model: nn.Module, accelerator: Accelerator, *, compiled: bool
) -> Callable[[], AbstractContextManager[Any]]:
    """What to enter for a forward pass: the accelerator's autocast, and weights that are cast all at once.

    Weights are not cast at once in float32; nor in a compiled model, which fuses casts with what needs them; nor with
    several processes, which send the gradients of some layers while those of others are computed.

    Args:
        model: bare.
        accelerator: of the training.
        compiled: whether the model is.
    """
    dtype = HALF_TYPES.get(accelerator.mixed_precision)
    if dtype is None or compiled or accelerator.distributed_type != DistributedType.NO:
        return accelerator.autocast
    weights = HalfWeights(model, dtype)

    @contextmanager
    def both() -> Iterator[None]:
        with accelerator.autocast(), weights.cast():
            yield

    return both


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another type, by one operator."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class _CastAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that was not used has no gradient
        return tuple(cast_all(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(cast_all([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(found) for gradient in gradients)
