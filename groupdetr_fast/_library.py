"""The operator library ``torch.ops.groupdetr_fast``: schemas are defined here in Python, kernels attach to them.

The dispatcher alone chooses a kernel. Every op's PyTorch reference is its ``CompositeExplicitAutograd`` kernel, so an
op runs on every device; a kernel registered for CPU or CUDA takes precedence there. At most one file registers a kernel
for one (op, dispatch key); ``tests/ops/test_registration.py`` holds the table of owners.
"""

import functools
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import _gpus as gpus

NAMESPACE = "groupdetr_fast"
LIB = torch.library.Library(NAMESPACE, "DEF")

_public_ops: list[str] = []
_python_kernels: dict[tuple[str, bool], Callable[..., Any]] = {}  # by op, and whether for CUDA
_references: dict[str, Callable[..., Any]] = {}
_ways: dict[str, str] = {}
_in_triton: set[str] = set()
_warned: set[tuple[str, int]] = set()


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    public: bool = False,
    called_by_kernels: bool = False,
    way: str = "in plain PyTorch",
) -> None:
    """Define an op by its schema, its PyTorch reference and its fake (shape-only) kernel.

    Args:
        schema: ``name(arguments) -> results`` in torch's schema language.
        reference: what the op means; runs wherever no other kernel is registered.
        fake: returns empty results; it must allocate exactly as the kernels do (contiguous, by ``new_empty``).
        public: whether :func:`backends` lists the op.
        called_by_kernels: whether the reference is also an op of its own, ``<name>_reference``, which the compiled CUDA
            kernel calls on a GPU that it has no code for.
        way: how the reference runs on GPUs, in a sentence after "runs".
    """
    name = schema[: schema.index("(")]
    LIB.define(schema)
    LIB.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIB)
    if public:
        _public_ops.append(name)
    _references[name] = _telling_why(name, reference)
    _ways[name] = way
    if called_by_kernels:
        LIB.define(schema.replace(name, f"{name}_reference", 1))
        LIB.impl(f"{name}_reference", without_autocast(_references[name]), "CompositeExplicitAutograd")


def in_triton(name: str) -> None:
    """Note that the CUDA kernel of op ``name`` is one of Triton's, whether or not that is installed."""
    _in_triton.add(name)


def reference_of(name: str) -> Callable[..., Any]:
    """The reference of op ``name``, for kernels that do not run on some GPU; it warns of that once."""
    return _references[name]


def _telling_why(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, as a kernel calls it instead of running: once for each GPU it warns, and says why."""

    @functools.wraps(reference)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        index = next(arg.device.index for arg in args if isinstance(arg, torch.Tensor))
        if (name, index) not in _warned:
            _warned.add((name, index))
            warnings.warn(_sentence(gpus.name(index), [name], _ways[name], _why_not(name, index)), stacklevel=2)
        return reference(*args, **kwargs)

    return wrapped


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


def backends(*, ask_gpu: bool = True) -> dict[str, dict[str, str]]:
    """Which kernel runs each op on the CPU and on the current GPU (``torch.cuda.current_device()``).

    Args:
        ask_gpu: whether to ask the GPU if it can run the kernels, which initialises CUDA. If not, and where there is no
            GPU, the kernels count that were installed.

    Returns:
        ``{op: {"cpu": kind, "cuda": kind}}`` with kind ``"C++"``, ``"CUDA"``, ``"Triton"`` or ``"PyTorch"`` for a
        kernel of that device, and ``"reference"`` where the op runs its PyTorch reference; :func:`missing_kernels`
        tells why.
    """
    return {op: kinds_of(op, ask_gpu=ask_gpu) for op in _public_ops}


def kinds_of(op: str, *, ask_gpu: bool = True) -> dict[str, str]:
    """What :func:`backends` says of one op; nothing is asked about others."""
    index = torch.cuda.current_device() if ask_gpu and torch.cuda.is_available() else None
    return {"cpu": _kernel_kind(op, "CPU"), "cuda": _kind_on_gpu(op, index)}


def missing_kernels() -> list[str]:
    """Why ops have no kernel and what they run on instead: a sentence for each reason and device of this machine.

    Without a GPU, but in a torch with CUDA, what would be missing on any GPU is told too. Asking GPUs initialises CUDA.
    """
    indices: list[int | None] = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    if not indices and torch.version.cuda is not None:
        indices = [None]
    found: dict[tuple[str, str, str], list[str]] = {}
    for op in _public_ops:
        if _kernel_kind(op, "CPU") == "reference":
            found.setdefault(("the CPU", "in plain PyTorch", gpus.why_not_built() or ""), []).append(op)
        for index in indices:
            if _kind_on_gpu(op, index) == "reference":
                device = "GPUs" if index is None else gpus.name(index)
                found.setdefault((device, _ways[op], _why_not(op, index)), []).append(op)
    return [_sentence(device, names, way, why) for (device, way, why), names in found.items()]


def _sentence(device: str, names: list[str], way: str, why: str) -> str:
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"on {device} {listed} {'runs' if len(names) == 1 else 'run'} {way}, which is slow: {why}"


def _kind_on_gpu(op: str, index: int | None) -> str:
    """The kind of kernel that serves an op on a GPU, or that would on one that can run it (``index`` None)."""
    kind = _kernel_kind(op, "CUDA")
    return "reference" if index is not None and kind != "reference" and _why_not(op, index) else kind


def _why_not(op: str, index: int | None) -> str:
    """Why an op has no kernel on a GPU, or on any (``index`` None); empty if it has one."""
    if index is None:
        return (gpus.NO_TRITON if op in _in_triton else gpus.why_not_built()) or ""
    return (gpus.why_not_triton(index) if op in _in_triton else gpus.why_not_compiled(index)) or ""


def has_kernel(op: str, key: str) -> bool:
    """Whether an op has a kernel for ``"CPU"`` or ``"CUDA"``, where it would run on its reference otherwise."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


def _kernel_kind(op: str, key: str) -> str:
    name = f"{NAMESPACE}::{op}"
    if not has_kernel(op, key):
        return "reference"
    owner = re.search(rf"^{key}: registered at (\S+)", torch._C._dispatch_dump(name), re.MULTILINE)
    compiled = owner is not None and re.search(r"\.(cpp|cu):\d+$", owner.group(1)) is not None
    if key == "CUDA":
        return "CUDA" if compiled else "Triton"
    return "C++" if compiled else "PyTorch"


def load_extension() -> None:
    """Import the compiled kernels if they were built; a built extension that does not load is an error.

    Raises:
        ImportError: if it does not.
    """
    if importlib.util.find_spec(f"{NAMESPACE}._C") is None:
        warnings.warn(f"{gpus.why_not_built()}: its ops run on their PyTorch references, which are slow", stacklevel=2)
        return
    try:
        importlib.import_module(f"{NAMESPACE}._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled kernels of groupdetr_fast do not load in torch {torch.__version__} on Python "
            f"{sys.version.split()[0]} (they need torch 2.11 and Python 3.10, or later): {error}. Install one of its "
            "wheels, or reinstall it from source in this environment."
        ) from error
    why = gpus.why_not_built()
    if why is not None and torch.cuda.is_available():
        warnings.warn(f"a GPU is available, but {why}: some ops run on their PyTorch references there", stacklevel=2)
