"""Launches of Triton kernels that cost the host little.

``kernel[grid](...)`` finds out at every launch how each argument is specialised, and builds the text by which it looks
the compiled kernel up: tens of microseconds, where the launch itself takes a few and small batches keep a GPU busy for
twenty. A :class:`Launch` has all that settled but what depends on the tensors, and remembers what Triton compiled.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["DIRECT", "OPTIONS", "Launch", "empty_as", "flat_rows"]

# Versions whose compiled kernels are launched here by what Triton's own JITFunction.run calls in the end. Others launch
# as they know how to, as do AMD's GPUs, for which Triton compiles by the size of tensors, too.
DIRECT = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")) and torch.version.hip is None
_ALIGNMENT = 16  # bytes; of pointers that Triton compiles for
# Fuse a product and the sum after it. Triton 3.9 does so by default and warns that 3.10 will not.
OPTIONS = {"enable_fp_fusion": True}


class _Compiled(NamedTuple):
    kernel: Any  # a CompiledKernel, which unloads its code when it is collected
    run: Callable[..., None]
    function: int
    metadata: tuple[int, ...]


class Launch:
    """A launch of a kernel whose numbers are settled: called with tensors, it runs on the current device and stream.

    It does what ``kernel[grid](*tensors, *numbers, **settings)`` does, with sums fused into products. What Triton
    compiled is looked up by the device and by the dtypes and alignment of the tensors; numbers and settings cannot
    change. Where a hook wants to see launches or compilations, or Triton is of a version that is not known here, Triton
    launches.

    Args:
        kernel: under ``triton.jit``; its parameters are tensors, numbers and settings, in this order.
        grid: numbers of programs in up to three dimensions, or the number in one.
        numbers: integers and floating point numbers.
        settings: values of the parameters that are ``constexpr``, and options such as ``num_warps``.
    """

    def __init__(
        self, kernel: Any, grid: int | tuple[int, ...], numbers: tuple[float, ...], settings: Mapping[str, Any]
    ):
        self._kernel = kernel
        self._is_compiled = isinstance(kernel, JITFunction)  # and not interpreted
        sizes = (grid,) if isinstance(grid, int) else grid
        self._grid = (*sizes, *[1] * (3 - len(sizes)))
        self._numbers = numbers
        self._settings = {**settings, **OPTIONS}
        constants = (name for name in kernel.arg_names if name in self._settings)
        self._last_arguments = (*numbers, *(self._settings[name] for name in constants))
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch.

        Args:
            tensors: on the current device, or None where the kernel is compiled without one.
        """
        if not (self._is_compiled and DIRECT):
            self._kernel[self._grid](*tensors, *self._numbers, **self._settings)
            return
        active = driver.active
        device = active.get_current_device()
        addresses = 0
        key: list[Any] = [active, device, knobs.runtime.debug]
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                addresses |= tensor.data_ptr()
                key.append(tensor.dtype)
        if addresses % _ALIGNMENT:
            key += [tensor is not None and tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors]
        found = self._compiled.get(tuple(key))
        if found is None or _is_watched(self._kernel):
            self._launch_by_triton(tuple(key), tensors)
            return
        stream = active.get_current_stream(device)
        no_hooks = None, None, None  # metadata for hooks, and two hooks
        found.run(*self._grid, stream, found.function, found.metadata, *no_hooks, *tensors, *self._last_arguments)

    def _launch_by_triton(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> None:
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._settings)
        if compiled is not None and not _is_watched(self._kernel):
            self._compiled[key] = _Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata)


def empty_as(tensor: Tensor) -> Tensor:
    """``tensor.new_empty(tensor.shape)``, contiguous whatever the strides of the tensor are, in half the time."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def flat_rows(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor ``[..., rows, columns]``, and its strides as ``[problems, rows, columns]``.

    It is copied where its leading dimensions cannot be seen as one.
    """
    if tensor.is_contiguous():
        rows, columns = tensor.shape[-2:]
        return tensor, (rows * columns, columns, 1)
    tensor = tensor.reshape(-1, *tensor.shape[-2:])
    return tensor, tensor.stride()


def _is_watched(kernel: JITFunction) -> bool:
    """Whether someone hooked into launches of the kernel, or changes how it is compiled."""
    runtime = knobs.runtime
    # Chains of hooks that may be empty, a function, or None.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return bool(hooked or runtime.add_stages_inspection_hook or knobs.compilation.instrumentation_mode)
