"""Weights in the half type of a step, cast all at once.

Autocast casts a weight where it is used, and the backward pass casts its gradient back: two kernels of a few
microseconds for each of hundreds of weights, a sixth of all that a step of a Conditional DETR R50 launches. Here all
weights are cast by one operator and all gradients by another. Every number stays the same, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

__all__ = ["HalfWeights", "weight_casts"]

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Whose weights autocast casts in their forward passes. Not their subclasses, which may do something else with them
# before, such as convolutions that standardise their weights.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class HalfWeights:
    """Lets linear layers and convolutions have weights that are cast already.

    Args:
        model: bare; its modules are looked up once. Weights that are not float32 are left as they are.
        dtype: to which autocast would cast them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        for module in model.modules():
            if type(module) in CAST:
                kept = module._parameters
                found = ((name, weight) for name, weight in kept.items() if weight is not None)
                self._places += [(kept, name, weight) for name, weight in found if weight.dtype is torch.float32]

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Inside, which is for a forward pass and all backward passes from it, the modules have their weights cast.

        Gradients reach the parameters in float32. Frozen weights are cast, too, and get none.
        """
        weights = list({id(weight): weight for _, _, weight in self._places}.values())
        trained = [weight for weight in weights if weight.requires_grad]
        frozen = [weight for weight in weights if not weight.requires_grad]
        with torch.no_grad():
            halves = cast_all(frozen, self.dtype)
        if trained:
            halves += _CastAll.apply(self.dtype, *trained)
        of = {id(weight): half for weight, half in zip([*frozen, *trained], halves, strict=True)}
        for kept, name, weight in self._places:
            kept[name] = of[id(weight)]
        try:
            yield
        finally:
            for kept, name, weight in self._places:
                kept[name] = weight


def weight_casts(
    model: nn.Module, accelerator: Accelerator, *, compiled: bool
) -> Callable[[], AbstractContextManager[None]]:
    """What to enter for the forward and backward passes of a batch.

    It does nothing in float32; where a model is compiled, which fuses casts with what needs them; and with several
    processes, which send gradients while those of other layers are computed, and not all at the end.

    Args:
        model: bare.
        accelerator: of the training.
        compiled: whether the model is.
    """
    dtype = HALF_TYPES.get(accelerator.mixed_precision)
    if dtype is None or compiled or accelerator.distributed_type != DistributedType.NO:
        return nullcontext
    return HalfWeights(model, dtype).cast


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
