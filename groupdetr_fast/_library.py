"""The operator library ``torch.ops.groupdetr_fast``: schemas are defined here in Python, kernels attach to them.

The dispatcher alone chooses a kernel. Every op's PyTorch reference is its ``CompositeExplicitAutograd`` kernel, so an
op runs on every device; a kernel registered for CPU or CUDA takes precedence there. At most one file registers a kernel
for one (op, dispatch key); ``tests/ops/test_registration.py`` holds the table of owners.
"""

import functools
import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

NAMESPACE = "groupdetr_fast"
LIB = torch.library.Library(NAMESPACE, "DEF")

_public_ops: list[str] = []
_python_kernels: dict[tuple[str, bool], Callable[..., Any]] = {}  # by op, and whether for CUDA


def define_op(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], public: bool = False) -> None:
    """Define an op by its schema, its PyTorch reference and its fake (shape-only) kernel.

    Args:
        schema: ``name(arguments) -> results`` in torch's schema language.
        reference: what the op means; runs wherever no other kernel is registered.
        fake: returns empty results; it must allocate exactly as the kernels do (contiguous, by ``new_empty``).
        public: whether :func:`backends` lists the op.
    """
    name = schema[: schema.index("(")]
    LIB.define(schema)
    LIB.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIB)
    if public:
        _public_ops.append(name)


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, run in the dtypes of its inputs; autocast would otherwise reach the torch ops that it is made of."""

    @functools.wraps(kernel)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return kernel(*args, **kwargs)

    return wrapped


def register_kernel(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Run a Python function as the kernel of op ``name``.

    Args:
        name: of an op that is defined.
        kernel: takes all arguments in order. What autocast would reach in it runs inside :func:`without_autocast`.
        key: ``"CPU"`` or ``"CUDA"``.
    """
    LIB.impl(name, kernel, key)
    _python_kernels[name, key == "CUDA"] = kernel


def python_kernel(name: str, tensor: torch.Tensor) -> Callable[..., Any] | None:
    """What :func:`register_kernel` registered for the device of a tensor, a CPU or a GPU of CUDA."""
    return _python_kernels.get((name, tensor.is_cuda))


def register_autograd(name: str, *, setup_context: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Make op ``name`` differentiable by ``backward``, which should call the op ``<name>_backward``."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIB)


def block_double_backward(name: str) -> None:
    """Raise, instead of returning wrong zeros, where a gradient of backward op ``name`` is asked for."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{NAMESPACE}::{name} has no derivative: double backward is not supported")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIB)


def backends() -> dict[str, dict[str, str]]:
    """Which kernel the dispatcher runs for each op on each device.

    Returns:
        ``{op: {"cpu": kind, "cuda": kind}}`` with kind ``"C++"``, ``"CUDA"``, ``"Triton"`` or ``"PyTorch"`` for a
        kernel of that device, and ``"reference"`` where the op runs its PyTorch reference.
    """
    return {op: {"cpu": _kernel_kind(op, "CPU"), "cuda": _kernel_kind(op, "CUDA")} for op in _public_ops}


def _kernel_kind(op: str, key: str) -> str:
    name = f"{NAMESPACE}::{op}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        return "reference"
    owner = re.search(rf"^{key}: registered at (\S+)", torch._C._dispatch_dump(name), re.MULTILINE)
    compiled = owner is not None and re.search(r"\.(cpp|cu):\d+$", owner.group(1)) is not None
    if key == "CUDA":
        return "CUDA" if compiled else "Triton"
    return "C++" if compiled else "PyTorch"


def load_extension() -> None:
    """Import the compiled kernels if they were built; a built extension that does not load is an error."""
    if importlib.util.find_spec(f"{NAMESPACE}._C") is None:
        warnings.warn(
            "groupdetr_fast was installed without its compiled kernels: its ops run on their PyTorch references, "
            "which are slow. Reinstall with a C++ compiler, or set GROUPDETR_FAST_BUILD=cpu to see why it fails.",
            stacklevel=2,
        )
        return
    importlib.import_module(f"{NAMESPACE}._C")
    if torch.cuda.is_available() and _kernel_kind("linear_assignment", "CUDA") != "CUDA":
        warnings.warn(
            "a GPU is available, but groupdetr_fast was built without its CUDA kernels: some ops run on their PyTorch "
            "references there. Reinstall where nvcc is installed, or with GROUPDETR_FAST_BUILD=cuda.",
            stacklevel=2,
        )
