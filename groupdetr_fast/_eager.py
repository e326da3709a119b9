"""Calls of the library's ops from eager Python, by the short way where it makes no difference.

``torch.library`` makes an op differentiable by a kernel for the key ``Autograd`` that is written in Python for any op,
and that takes the host several times as long as a launch. Where a call would meet nothing but autograd on its way to
the kernel, :class:`EagerOp` takes the short way: one ``autograd.Function``, and the kernel. Everywhere else, and where
``torch.ops.groupdetr_fast`` is called directly, the op goes through the dispatcher.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.overrides import has_torch_function

from ._library import NAMESPACE, python_kernel, register_autograd

__all__ = ["EagerOp"]

_keys_of = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_profiler_enabled = torch._C._autograd._profiler_enabled
_any_requires_grad = torch._C._any_requires_grad


def _bits(*keys: DispatchKey) -> int:
    bits = 0
    for key in keys:
        bits |= DispatchKeySet(key).raw_repr()
    return bits


# Keys that plain tensors on a CPU or a GPU have and that the ops have nothing to do for, but for autograd.
_PLAIN = _bits(
    DispatchKey.CPU,
    DispatchKey.CUDA,
    DispatchKey.BackendSelect,
    DispatchKey.ADInplaceOrView,
    DispatchKey.AutogradCPU,
    DispatchKey.AutogradCUDA,
    DispatchKey.AutocastCPU,
    DispatchKey.AutocastCUDA,
)
_OTHERS = ~_PLAIN
_NO_INFERENCE_MODE = _bits(DispatchKey.ADInplaceOrView)
_AUTOGRAD = _bits(DispatchKey.AutogradCPU) & _bits(DispatchKey.AutogradCUDA)  # the bit that their devices share


def meets_only_autograd(tensors: tuple[Tensor, ...]) -> bool:
    """Whether an op on these tensors would go straight to autograd and the kernel of their device.

    Not so under a trace, a profiler, a mode or a transform of ``torch.func``, for subclasses and lazy tensors (such as
    negations), and where autograd itself is left out.
    """
    included = keys = _included().raw_repr()
    for tensor in tensors:
        keys |= _keys_of(tensor).raw_repr()
    if keys & _OTHERS or has_torch_function(tensors) or _profiler_enabled():
        return False
    return not (_excluded().raw_repr() & _AUTOGRAD and included & _NO_INFERENCE_MODE)


class EagerOp:
    """An op of the library, to be called with all its arguments in order.

    Args:
        name: of an op that is defined, with at least two tensors among its arguments.
    """

    def __init__(self, name: str):
        self._name = name
        self._op = getattr(getattr(torch.ops, NAMESPACE), name).default
        arguments = enumerate(self._op._schema.arguments)
        self._tensors_of = itemgetter(*(index for index, argument in arguments if str(argument.type) == "Tensor"))
        self._returns_first = False
        self._function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._by_dispatcher(args)
        tensors = self._tensors_of(args)
        if not meets_only_autograd(tensors):
            return self._by_dispatcher(args)
        if torch.is_grad_enabled() and _any_requires_grad(*tensors):
            return self._by_dispatcher(args) if self._function is None else self._function.apply(*args)
        output = self._run(*args)
        return output[0] if self._returns_first else output

    def _by_dispatcher(self, args: tuple[Any, ...]) -> Any:
        output = self._op(*args)
        return output[0] if self._returns_first else output

    def _run(self, *args: Any) -> Any:
        """The kernel; nothing records it."""
        kernel = python_kernel(self._name, args[0])
        if kernel is not None:
            return kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._op(*args)

    def register_autograd(
        self, *, setup_context: Callable[..., Any], backward: Callable[..., Any], returns_first: bool = False
    ) -> None:
        """Make the op differentiable, called in this way or by the dispatcher; as of ``torch.library``.

        Args:
            setup_context: ``(ctx, inputs, output)``.
            backward: ``(ctx, *grads)``; it should call an :class:`EagerOp` that blocks double backward.
            returns_first: whether calls of this object return the first of several outputs alone, with a gradient: the
                others are for backward, and each one that is returned costs the host time.
        """
        register_autograd(self._name, setup_context=setup_context, backward=backward)
        run = self._run
        self._returns_first = returns_first

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output[0] if returns_first else output

        def backward_of_first(ctx: Any, grad: Tensor) -> Any:
            return backward(ctx, grad, None)

        members = {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward_of_first if returns_first else backward),
        }
        self._function = type(f"{self._name}_eager", (torch.autograd.Function,), members)
