"""``sigmoid_focal_loss`` on NVIDIA GPUs: one pass over the logits forward, one backward."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_focal import class_probability, focal_factor
from .._triton_launch import Launch, empty_as, flat_rows
from . import reference

_NO_OBJECT = tl.constexpr(reference.NO_OBJECT)
_IGNORED = tl.constexpr(reference.IGNORED)
_LAUNCH = {"num_warps": 4, "num_stages": 1}
# The number of denoising queries changes from batch to batch; its divisors are not worth a compilation.
_NOT_SPECIALIZED = ["queries"]


@triton.jit
def _rows_of_program(target_classes, queries, classes, BLOCK_Q: tl.constexpr):
    """The problem and the queries of this program, their targets, and which queries count and have a known target."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    target = tl.load(target_classes + problem * queries + q, mask=q < queries, other=_IGNORED)
    return problem, q, target, target != _IGNORED, (target >= _NO_OBJECT) & (target < classes)


@triton.jit
def _load_logits(row, c, stride_c, mask, DTYPE: tl.constexpr):
    return tl.load(row[:, None] + (c.to(tl.int64) * stride_c)[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _sigmoid_focal_loss_fwd_kernel(
    partial,  # [P, blocks of queries]
    logits,  # [P, Q, C]
    target_classes,  # [P, Q]
    stride_p,
    stride_q,
    stride_c,
    queries,
    classes,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    problem, q, target, counts, known = _rows_of_program(target_classes, queries, classes, BLOCK_Q)
    row = logits + problem * stride_p + q.to(tl.int64) * stride_q
    DTYPE: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros([BLOCK_Q, BLOCK_C], DTYPE)
    for first in range(0, classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = counts[:, None] & (c < classes)[None, :]
        logit = _load_logits(row, c, stride_c, mask, DTYPE)
        is_target = target[:, None] == c[None, :]
        # By symmetry a present class costs what an absent one of the opposite logit does.
        present, _, minus_log_present, minus_log_absent = class_probability(tl.where(is_target, -logit, logit))
        loss = focal_factor(present, minus_log_present, GAMMA) * minus_log_absent
        total += tl.where(mask, tl.where(is_target, ALPHA * loss, (1 - ALPHA) * loss), 0.0)
    total = tl.where((counts & ~known)[:, None], float("nan"), total)
    tl.store(partial + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _sigmoid_focal_loss_bwd_kernel(
    grad_logits,  # [P, Q, C]
    grad_loss,  # [P]
    logits,  # [P, Q, C]
    target_classes,  # [P, Q]
    stride_p,
    stride_q,
    stride_c,
    queries,
    classes,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    problem, q, target, counts, known = _rows_of_program(target_classes, queries, classes, BLOCK_Q)
    row = logits + problem * stride_p + q.to(tl.int64) * stride_q
    grad_row = grad_logits + (problem * queries + q) * classes
    upstream = tl.load(grad_loss + problem)
    for first in range(0, classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (q < queries)[:, None] & (c < classes)[None, :]
        logit = _load_logits(row, c, stride_c, inside & counts[:, None], grad_loss.dtype.element_ty)
        is_target = target[:, None] == c[None, :]
        present, absent, minus_log_present, minus_log_absent = class_probability(tl.where(is_target, -logit, logit))
        derivative = focal_factor(present, minus_log_present, GAMMA) * (GAMMA * absent * minus_log_absent + present)
        grad = upstream * tl.where(is_target, -ALPHA * derivative, (1 - ALPHA) * derivative)
        grad = tl.where(known[:, None], grad, float("nan"))
        grad = tl.where(counts[:, None], grad, 0.0)
        tl.store(grad_row[:, None] + c[None, :], grad.to(grad_logits.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target_classes: Tensor, alpha: float, gamma: float) -> Tensor:
    """Launch; the arguments are those of the operator. Leading dimensions that are no view of one are copied."""
    leading = logits.shape[:-2]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() == 0:
        return logits.new_zeros(leading, dtype=dtype)
    logits, strides = flat_rows(logits)
    launch, blocks = _forward_launch(logits.shape, strides, alpha, gamma)
    partial = logits.new_empty((*leading, blocks), dtype=dtype)
    launch(partial, logits, target_classes.contiguous())
    return partial.sum(-1)


def backward(grad_loss: Tensor, logits: Tensor, target_classes: Tensor, alpha: float, gamma: float) -> Tensor:
    """Launch; the arguments are those of the operator. Leading dimensions that are no view of one are copied."""
    grad_logits = empty_as(logits)
    if logits.numel() == 0:
        return grad_logits
    logits, strides = flat_rows(logits)
    launch = _backward_launch(logits.shape, strides, alpha, gamma)
    launch(grad_logits, grad_loss.contiguous(), logits, target_classes.contiguous())
    return grad_logits


@functools.lru_cache(maxsize=1024)
def _forward_launch(shape: torch.Size, strides: tuple[int, ...], alpha: float, gamma: float) -> tuple[Launch, int]:
    """A launch, and how many partial sums it writes for each problem."""
    return _launch(_sigmoid_focal_loss_fwd_kernel, shape, strides, alpha, gamma)


@functools.lru_cache(maxsize=1024)
def _backward_launch(shape: torch.Size, strides: tuple[int, ...], alpha: float, gamma: float) -> Launch:
    return _launch(_sigmoid_focal_loss_bwd_kernel, shape, strides, alpha, gamma)[0]


def _launch(
    kernel: triton.JITFunction, shape: torch.Size, strides: tuple[int, ...], alpha: float, gamma: float
) -> tuple[Launch, int]:
    """A launch for logits of a shape ``[..., Q, C]``, and its programs for each problem."""
    *leading, queries, classes = shape
    tile = _blocks(classes)
    blocks = triton.cdiv(queries, tile["BLOCK_Q"])
    settings = {"ALPHA": alpha, "GAMMA": gamma, **tile, **_LAUNCH}
    return Launch(kernel, math.prod(leading) * blocks, (*strides, queries, classes), settings), blocks


def _blocks(classes: int) -> dict[str, int]:
    """Tiles of 512 logits. Rows are cut into 32 classes or less, so that few lanes lie beyond the last one."""
    block_c = min(32, triton.next_power_of_2(classes))
    return {"BLOCK_Q": 512 // block_c, "BLOCK_C": block_c}
