"""The op ``cross_attention``: attention of many queries to the tokens of padded images."""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ... import _gpus as gpus
from ..._eager import EagerOp
from ..._library import block_double_backward, define_op
from .._attention import MAX_DIM, check_kinds, fake, fake_backward, settled
from .._dropout import is_fast_on, new_seed
from .._triton import has_tensor_cores, register_triton
from . import cpu
from .reference import cross_attention_backward_reference, cross_attention_reference

_HAS_GPU_KERNEL = importlib.util.find_spec("triton") is not None
_WANTED = os.environ.get("GROUPDETR_FAST_CROSS_ATTENTION") != "0"


def is_preferred(query: Tensor, value: Tensor, padding: Tensor | None, dropout_p: float) -> bool:
    """Whether the layers take this op for such arguments.

    They do under a mask of padding on GPUs whose tensor cores a kernel runs on, in half precision; heads that are too
    wide run on the reference, which keeps all scores. And they do with dropout on CPUs, where torch keeps the scores
    and draws a number for each. If the environment variable ``GROUPDETR_FAST_CROSS_ATTENTION`` was 0 when the package
    was imported, they do not.
    """
    if not _WANTED:
        return False
    if query.device.type == "cpu":
        return dropout_p > 0 and is_fast_on(query)
    if padding is None or not _HAS_GPU_KERNEL or query.device.type != "cuda":
        return False
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return is_half and max(query.shape[-1], value.shape[-1]) <= MAX_DIM and _serves(query.device)


@torch.compiler.assume_constant_result  # what a GPU is asked cannot be traced
def _serves(device: torch.device) -> bool:
    return _asked_once(device)


@functools.cache
def _asked_once(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU, on tensor cores.

    A tensor that is traced may lie on a GPU that is not there, which is taken to serve.
    """
    if not torch.cuda.is_available():
        return True
    return gpus.why_not_triton(device.index) is None and has_tensor_cores(device)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of every query to every key that is not padding, as DETR's decoders attend to an image.

    This is ``scaled_dot_product_attention`` under a mask of keys. Padding takes no time: of the keys and values of an
    image, kernels visit those that are not padding. No array of size L x S is allocated, but on GPUs with float64 or
    heads of more than 128 channels, which run on the reference.

    Args:
        query: ``[B, L, H, D]``: images, queries, heads, channels.
        key: ``[B, S, H, D]``: images, tokens, heads, channels.
        value: ``[B, S, H, Dv]``.
        padding: ``[B, S]`` bool, True on tokens that no query may see, as in DETR; None for no padding. What such
            tokens hold changes nothing as long as it is finite, and their gradients are 0.
        dropout_p: probability to drop an attention probability, in [0, 1); pass 0 in evaluation. The others are scaled
            by ``1 / (1 - dropout_p)``. What is dropped follows from a seed that is drawn from torch's default
            generator of the device (``torch.manual_seed``), and does not depend on how far an image is padded.
        scale: factor of the dot products; ``1 / sqrt(D)`` if None.

    Returns:
        ``[B, L, H, Dv]``, contiguous, in the dtype of the inputs; 0 in images that are all padding.

    query, key and value share one dtype: float32, float64, float16 or bfloat16. Sums over keys and channels are
    accumulated in float32 (float64 for float64), also under autocast. On GPUs, products of float32 lose precision to
    TF32 only if torch may use that for matrices (``torch.set_float32_matmul_precision``). Forward and backward are
    deterministic. There is no double backward.

    Raises:
        TypeError: if the dtypes differ or are none of these, or padding is not bool.
        ValueError: if a shape, a device or dropout_p does not fit.
    """
    _check(query, key, value, padding)
    dropout_p, scale = settled(query, dropout_p, scale)
    seed = new_seed(query.device) if dropout_p > 0 else None
    return _op(query, key, value, padding, dropout_p, seed, scale)


def _check(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
    check_kinds(query, key, value)
    batch, _, heads, dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[2:] != query.shape[2:]:
        raise ValueError(f"key must have shape [{batch}, S, {heads}, {dim}], got {list(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must have shape [{batch}, {key.shape[1]}, {heads}, Dv], got {list(value.shape)}")
    if padding is not None:
        if padding.dtype != torch.bool:
            raise TypeError(f"padding must be bool, True on padding, got {padding.dtype}")
        if padding.shape != key.shape[:2]:
            raise ValueError(f"padding must have shape [{batch}, {key.shape[1]}], got {list(padding.shape)}")
        if padding.device != query.device:
            raise ValueError(f"padding must lie on the device of query, {query.device}, got {padding.device}")


define_op(
    "cross_attention(Tensor query, Tensor key, Tensor value, Tensor? padding, float dropout_p, Tensor? seed, "
    "float scale) -> (Tensor out, Tensor lse)",
    reference=cross_attention_reference,
    fake=fake,
    public=True,
)
define_op(
    "cross_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor out, "
    "Tensor lse, float dropout_p, Tensor? seed, float scale) -> (Tensor, Tensor, Tensor)",
    reference=cross_attention_backward_reference,
    fake=fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, padding, ctx.dropout_p, seed, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, padding, out, lse, seed)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Any) -> tuple[Tensor | None, ...]:
    query, key, value, padding, out, lse, seed = ctx.saved_tensors
    grad_query, grad_key, grad_value = _op_backward(
        grad_out, query, key, value, padding, out, lse, ctx.dropout_p, seed, ctx.scale
    )
    no_grad_padding = no_grad_dropout_p = no_grad_seed = no_grad_scale = None
    return grad_query, grad_key, grad_value, no_grad_padding, no_grad_dropout_p, no_grad_seed, no_grad_scale


_op = EagerOp("cross_attention")
_op_backward = EagerOp("cross_attention_backward")
_op.register_autograd(setup_context=_setup_context, backward=_backward, returns_first=True)
block_double_backward("cross_attention_backward")
cpu.register()
for op, launcher in (("cross_attention", "forward"), ("cross_attention_backward", "backward")):
    register_triton(op, f"{__package__}.triton_launch", launcher)
