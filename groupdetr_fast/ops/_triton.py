"""What the ops that have Triton kernels share: how they are registered, and how their kernels are listed."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _gpus as gpus
from .._library import in_triton, reference_of, register_kernel, without_autocast

if TYPE_CHECKING:
    from triton import JITFunction


class CompileCase(NamedTuple):
    """One configuration of a Triton kernel, with all that it takes to compile it without a GPU.

    Beside every module of Triton kernels, ``triton_cases.py`` has a function ``compile_cases()`` that yields these;
    ``make compile-gpu`` and the tests compile them.

    Attributes:
        name: ``<op>/<kernel>/<configuration>``, unique in the package.
        kernel: the function under ``triton.jit``.
        signature: the type of every parameter in Triton's words, such as ``"*fp32"``, ``"i32"`` or ``"constexpr"``.
        constexprs: the value of every parameter that is a ``constexpr``.
        num_warps, num_stages: as at the launch.
        aligned: parameters that are multiples of 16 where the kernel usually runs: addresses in bytes, and sizes.
            Triton compiles for that, and reads several elements at a time.
        oldest, newest: the compute capabilities of the GPUs that are served by it, 75 for 7.5.
    """

    name: str
    kernel: "JITFunction"
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    oldest: int = 70
    newest: int = 999

    def attributes(self) -> dict[tuple[int], list[list[object]]]:
        """``aligned`` as ``triton.compiler.ASTSource`` takes it."""
        return {(self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}


def kernel_signature(kernel: "JITFunction", types: dict[str, str], constexprs: dict[str, object]) -> dict[str, str]:
    """The signature of a :class:`CompileCase`; parameters are ``i32`` unless ``types`` or ``constexprs`` name them."""
    return {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}


def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton uses the tensor cores of a device: those of compute capability 8.0 and later, since Triton 3.3.

    On others, products of matrices are sums of products of numbers. In Triton's interpreter devices are CPUs.
    """
    return device.type != "cuda" or gpus.capability(device.index) >= (8, 0)


def register_triton(op: str, module: str, launcher: str) -> None:
    """Run function ``launcher`` of ``module`` as the kernel of ``op`` on CUDA tensors, if Triton is installed.

    The first call imports the module, so that nothing imports Triton where no GPU is used. The op's first argument is a
    tensor, and its launcher launches by :class:`~groupdetr_fast.ops._triton_launch.Launch`. On a GPU that Triton cannot
    serve, the op runs on its reference.
    """
    in_triton(op)
    if importlib.util.find_spec("triton") is None:
        return
    reference = reference_of(op)

    @functools.cache
    def launch() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), launcher)

    def kernel(*args: Any) -> Any:
        device = args[0].device
        if gpus.why_not_triton(device.index) is not None:
            return reference(*args)
        run = without_autocast(launch()) if torch.is_autocast_enabled("cuda") else launch()
        if device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments say
            return run(*args)

    register_kernel(op, kernel, "CUDA")
