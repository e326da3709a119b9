"""``grouped_attention`` on NVIDIA GPUs: flash attention over the allowed rectangles of the attention matrix alone.

The algorithm is that of Dao (2023, "FlashAttention-2"). Forward keeps, besides the result, the log-sum-exp of each
query, from which backward recomputes the probabilities, first for the gradient of the queries, then for those of the
keys and values. A program owns what it writes: there are no atomics, and results are the same from run to run.

Traffic: queries and results pass through memory once; a group's keys and values (300 x 32 x 2 bytes = 19 KB each per
head in half precision) are read once per block of queries, from L2 after the first. Scores never leave the registers.
With heads of 32 channels the exponentials, not the products, are the work: hence base 2, one multiply-add for scale and
maximum, and no masks where zeros or repeated rows do as well.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...groups import QueryGroups
from .reference import grouped_attention_backward_reference, grouped_attention_reference
from .triton_blocks import (
    count_steps,
    dropout_keys,
    is_kept,
    load_rows,
    load_rows_repeating_last,
    locate,
    of_problem,
    step_at,
    store_rows,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# The numbers of a layout with denoising change from batch to batch; their divisors are not worth a compilation each.
_NOT_SPECIALIZED = [
    "num_heads",
    "length",
    "num_groups",
    "queries_per_group",
    "denoising_sets",
    "denoising_groups",
    "queries_per_denoising_group",
    "threshold",
]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grouped_attention_fwd_kernel(
    out,  # [B, L, H, Dv], contiguous
    lse,  # [B, H, L], contiguous
    query,
    key,
    value,
    seed,  # [1], None without dropout
    stride_qb,
    stride_ql,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_vd,
    num_heads,
    length,
    num_groups,
    queries_per_group,
    denoising_sets,
    denoising_groups,
    queries_per_denoising_group,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The result and the log-sum-exp of one block of queries."""
    problem, first, start, stop, more_start, more_stop = locate(
        num_groups,
        queries_per_group,
        denoising_sets,
        denoising_groups,
        queries_per_denoising_group,
        BLOCK=BLOCK,
        OF_KEYS=False,
    )
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    out = of_problem(out, problem, num_heads, length.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    rows = first + tl.arange(0, BLOCK)
    q = load_rows(query, first, stop - first, stride_ql, stride_qd, BLOCK, HEAD_DIM, BLOCK_D)
    if seed is not None:
        row_key0, row_key1 = dropout_keys(seed, problem, rows)

    scale *= _LOG2_E
    largest = tl.full([BLOCK], float("-inf"), tl.float32)  # scaled score
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for index in range(count_steps(start, stop, more_start, more_stop, STEP)):
        column, left = step_at(index, start, stop, more_start, more_stop, STEP)
        k = load_rows_repeating_last(key, column, left, stride_kl, stride_kd, STEP, HEAD_DIM, BLOCK_D)
        v = load_rows(value, column, left, stride_vl, stride_vd, STEP, VALUE_DIM, BLOCK_DV)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # Repeated keys do not change the maximum. That it is taken outside of the branch also lets Triton see that this
        # product feeds the next one, and lay out both alike.
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        if left < STEP:
            scores = tl.where((tl.arange(0, STEP) < left)[None, :], scores, float("-inf"))
        probabilities = tl.exp2(scores * scale - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(probabilities, 1)
        if seed is not None:
            columns = column + tl.arange(0, STEP)
            keep = is_kept(row_key0[:, None], row_key1[:, None], columns[None, :], threshold)
            probabilities = tl.where(keep, probabilities, 0.0)
        result = tl.dot(probabilities.to(v.dtype), v, result * correction[:, None], input_precision=PRECISION)
        largest = new_largest

    result *= (keep_scale / total)[:, None]
    store_rows(out, result, first, stop - first, num_heads * VALUE_DIM, BLOCK, VALUE_DIM, BLOCK_DV)
    tl.store(lse + problem.to(tl.int64) * length + rows, (largest + tl.log2(total)) * _LN_2, mask=rows < stop)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grouped_attention_bwd_query_kernel(
    grad_query,  # [B, L, H, D], contiguous
    delta,  # [B, H, L], contiguous: sum of out * grad_out over channels
    row_keys,  # [B, H, L, 2], contiguous: what dropout derives from a row; None without dropout
    grad_out,
    query,
    key,
    value,
    out,  # [B, L, H, Dv], contiguous
    lse,  # [B, H, L], contiguous
    seed,  # [1], None without dropout
    stride_gb,
    stride_gl,
    stride_gh,
    stride_gd,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_vd,
    num_heads,
    length,
    num_groups,
    queries_per_group,
    denoising_sets,
    denoising_groups,
    queries_per_denoising_group,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of one block of queries, and what the other kernel of backward needs to know of them."""
    problem, first, start, stop, more_start, more_stop = locate(
        num_groups,
        queries_per_group,
        denoising_sets,
        denoising_groups,
        queries_per_denoising_group,
        BLOCK=BLOCK,
        OF_KEYS=False,
    )
    grad_out = of_problem(grad_out, problem, num_heads, stride_gb, stride_gh)
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    out = of_problem(out, problem, num_heads, length.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    grad_query = of_problem(grad_query, problem, num_heads, length.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)
    count = stop - first
    q = load_rows(query, first, count, stride_ql, stride_qd, BLOCK, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_out, first, count, stride_gl, stride_gd, BLOCK, VALUE_DIM, BLOCK_DV)
    o = load_rows(out, first, count, num_heads * VALUE_DIM, 1, BLOCK, VALUE_DIM, BLOCK_DV)
    rows = first + tl.arange(0, BLOCK)
    places = problem.to(tl.int64) * length + rows
    row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + places, row_delta, mask=rows < stop)
    row_lse = tl.load(lse + places, mask=rows < stop, other=0.0) * _LOG2_E
    if seed is not None:
        row_key0, row_key1 = dropout_keys(seed, problem, rows)
        tl.store(row_keys + 2 * places, row_key0, mask=rows < stop)
        tl.store(row_keys + 2 * places + 1, row_key1, mask=rows < stop)

    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for index in range(count_steps(start, stop, more_start, more_stop, STEP)):
        column, left = step_at(index, start, stop, more_start, more_stop, STEP)
        # Beyond the end, keys are repeated so that no probability exceeds 1, and values and delta are 0.
        k = load_rows_repeating_last(key, column, left, stride_kl, stride_kd, STEP, HEAD_DIM, BLOCK_D)
        v = load_rows(value, column, left, stride_vl, stride_vd, STEP, VALUE_DIM, BLOCK_DV)
        is_key = tl.where(tl.arange(0, STEP) < left, 1.0, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        probabilities = tl.exp2(scores * (scale * _LOG2_E) - row_lse[:, None])
        grad_probabilities = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            columns = column + tl.arange(0, STEP)
            keep = is_kept(row_key0[:, None], row_key1[:, None], columns[None, :], threshold)
            grad_probabilities = tl.where(keep, grad_probabilities, 0.0) * keep_scale
        grad_scores = probabilities * (grad_probabilities - row_delta[:, None] * is_key[None, :])
        result = tl.dot(grad_scores.to(k.dtype), k, result, input_precision=PRECISION)

    store_rows(grad_query, result * scale, first, count, num_heads * HEAD_DIM, BLOCK, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grouped_attention_bwd_key_value_kernel(
    grad_key,  # [B, L, H, D], contiguous
    grad_value,  # [B, L, H, Dv], contiguous
    grad_out,
    query,
    key,
    value,
    lse,  # [B, H, L], contiguous, as delta
    delta,
    row_keys,  # [B, H, L, 2], contiguous; None without dropout
    stride_gb,
    stride_gl,
    stride_gh,
    stride_gd,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_vd,
    num_heads,
    length,
    num_groups,
    queries_per_group,
    denoising_sets,
    denoising_groups,
    queries_per_denoising_group,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of one block of keys and values. Scores are transposed here, ``[keys, queries]``."""
    problem, first, start, stop, more_start, more_stop = locate(
        num_groups,
        queries_per_group,
        denoising_sets,
        denoising_groups,
        queries_per_denoising_group,
        BLOCK=BLOCK,
        OF_KEYS=True,
    )
    grad_out = of_problem(grad_out, problem, num_heads, stride_gb, stride_gh)
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    grad_key = of_problem(grad_key, problem, num_heads, length.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)
    grad_value = of_problem(grad_value, problem, num_heads, length.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    count = stop - first
    k = load_rows_repeating_last(key, first, count, stride_kl, stride_kd, BLOCK, HEAD_DIM, BLOCK_D)
    v = load_rows(value, first, count, stride_vl, stride_vd, BLOCK, VALUE_DIM, BLOCK_DV)
    columns = first + tl.arange(0, BLOCK)

    key_result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    value_result = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for index in range(count_steps(start, stop, more_start, more_stop, STEP)):
        row, left = step_at(index, start, stop, more_start, more_stop, STEP)
        # Beyond the end, everything of a query is 0, and so is what it adds.
        q = load_rows(query, row, left, stride_ql, stride_qd, STEP, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row, left, stride_gl, stride_gd, STEP, VALUE_DIM, BLOCK_DV)
        is_row = tl.arange(0, STEP) < left
        places = problem.to(tl.int64) * length + row + tl.arange(0, STEP)
        row_lse = tl.load(lse + places, mask=is_row, other=0.0) * _LOG2_E
        row_delta = tl.load(delta + places, mask=is_row, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        probabilities = tl.exp2(scores * (scale * _LOG2_E) - row_lse[None, :])
        grad_probabilities = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dropped = probabilities
        if row_keys is not None:
            row_key0 = tl.load(row_keys + 2 * places, mask=is_row, other=0).to(tl.uint32)
            row_key1 = tl.load(row_keys + 2 * places + 1, mask=is_row, other=0).to(tl.uint32)
            keep = is_kept(row_key0[None, :], row_key1[None, :], columns[:, None], threshold)
            dropped = tl.where(keep, probabilities, 0.0)
            grad_probabilities = tl.where(keep, grad_probabilities, 0.0) * keep_scale
        value_result = tl.dot(dropped.to(grad.dtype), grad, value_result, input_precision=PRECISION)
        grad_scores = probabilities * (grad_probabilities - row_delta[None, :])
        key_result = tl.dot(grad_scores.to(q.dtype), q, key_result, input_precision=PRECISION)

    store_rows(grad_key, key_result * scale, first, count, num_heads * HEAD_DIM, BLOCK, HEAD_DIM, BLOCK_D)
    store_rows(grad_value, value_result * keep_scale, first, count, num_heads * VALUE_DIM, BLOCK, VALUE_DIM, BLOCK_DV)


class _Tile(NamedTuple):
    """Rows that a program owns, rows that it meets at a time, warps of a program, and stages of its loads."""

    block: int
    step: int
    num_warps: int
    num_stages: int = 2


# Tiles by precision and by the widest head, such that nothing spills and 99 KB of shared memory are enough, on every
# GPU since Ampere. Those of half types and heads of 32 channels were the fastest of 48 on an H200, for groups of 300.
# Measuring them at run time instead would stall the first steps of a training and could not be done while a CUDA graph
# is captured; blocks of 64 waste little on groups of 100, 300 or 900.
_TILES = {
    _grouped_attention_fwd_kernel: {
        "half": {32: _Tile(64, 64, 4, 3), 64: _Tile(64, 64, 4), 128: _Tile(64, 64, 4)},
        "tf32": {32: _Tile(64, 64, 4), 64: _Tile(64, 32, 4), 128: _Tile(64, 16, 4)},
        "tf32x3": {32: _Tile(64, 32, 4)},
        "ieee": {64: _Tile(32, 32, 4), 128: _Tile(32, 32, 8)},
    },
    _grouped_attention_bwd_query_kernel: {
        "half": {32: _Tile(64, 32, 4, 3), 64: _Tile(64, 64, 4), 128: _Tile(64, 32, 4)},
        "tf32": {32: _Tile(64, 64, 4), 64: _Tile(64, 16, 4), 128: _Tile(32, 32, 8)},
        "tf32x3": {32: _Tile(64, 32, 4)},
        "ieee": {64: _Tile(32, 16, 4), 128: _Tile(32, 16, 8)},
    },
    _grouped_attention_bwd_key_value_kernel: {
        "half": {32: _Tile(64, 32, 4, 3), 64: _Tile(64, 32, 4), 128: _Tile(64, 32, 4)},
        "tf32": {32: _Tile(64, 16, 4), 64: _Tile(64, 16, 4), 128: _Tile(32, 32, 4)},
        "tf32x3": {32: _Tile(64, 16, 4)},
        "ieee": {64: _Tile(32, 16, 4), 128: _Tile(32, 16, 8)},
    },
}
# For groups of at most so many queries, which would leave most of a larger tile empty.
_SMALL_GROUP = 32
_SMALL_TILE = _Tile(16, 16, 2)
_MAX_DIM = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: list[int], dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch; what the kernels do not cover runs on the reference."""
    if not _is_covered(query, value, scale):
        return grouped_attention_reference(query, key, value, layout, dropout_p, seed, scale)
    batch, length, heads, _ = query.shape
    out = value.new_empty(value.shape)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    tensors = (out, lse, query, key, value, seed)
    _launch(_grouped_attention_fwd_kernel, tensors, (query, key, value), layout, dropout_p, scale)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[int],
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; as :func:`forward`."""
    if not _is_covered(query, value, scale):
        return grouped_attention_backward_reference(
            grad_out, query, key, value, out, lse, layout, dropout_p, seed, scale
        )
    out, lse = out.contiguous(), lse.contiguous()  # as forward returned them
    grad_query, grad_key, grad_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    delta = lse.new_empty(lse.shape)
    row_keys = None if seed is None else lse.new_empty(*lse.shape, 2, dtype=torch.int32)
    strided = grad_out, query, key, value
    common = strided, layout, dropout_p, scale
    _launch(_grouped_attention_bwd_query_kernel, (grad_query, delta, row_keys, *strided, out, lse, seed), *common)
    _launch(_grouped_attention_bwd_key_value_kernel, (grad_key, grad_value, *strided, lse, delta, row_keys), *common)
    return grad_query, grad_key, grad_value


def _is_covered(query: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the kernels can do it. They find the largest score before scaling; hence the condition on ``scale``."""
    dims = query.shape[3], value.shape[3]
    return query.dtype in _DTYPES and all(1 <= dim <= _MAX_DIM for dim in dims) and scale > 0


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor | None, ...],
    strided: tuple[Tensor, ...],
    layout: Sequence[int],
    dropout_p: float,
    scale: float,
) -> None:
    """Launch a kernel that takes ``tensors``, the strides of ``strided`` (its end: query, key, value), and sizes."""
    query, _, value = strided[-3:]
    batch, _, heads, head_dim = query.shape
    precision = _precision(query.dtype, head_dim, value.shape[3])
    plan = _plan(kernel, precision, head_dim, value.shape[3], *layout)
    strides = []
    for tensor in strided:
        strides += tensor.stride()
    kernel[(batch * heads * plan.blocks,)](
        *tensors,
        *strides,
        heads,
        *plan.sizes,
        scale,
        int(dropout_p * 2**32),
        1 / (1 - dropout_p),
        **plan.options,
    )


class _Plan(NamedTuple):
    """What a launch derives from its sizes: blocks of rows, the kernel's ``length`` to ``queries_per_denoising_group``,
    and its compile-time arguments."""

    blocks: int
    sizes: tuple[int, ...]
    options: dict[str, int | str]


@functools.lru_cache(maxsize=256)  # the host has little time: small batches take the GPU some 20 microseconds
def _plan(kernel: triton.JITFunction, precision: str, head_dim: int, value_dim: int, *layout: int) -> _Plan:
    groups = QueryGroups.from_ints(layout)
    tile = _tile(kernel, precision, head_dim, value_dim, groups.queries_per_group)
    blocks = groups.num_groups * triton.cdiv(groups.queries_per_group, tile.block)
    blocks_per_denoising_group = triton.cdiv(groups.queries_per_denoising_group, tile.block)
    blocks += groups.denoising_sets * groups.denoising_groups * blocks_per_denoising_group
    sizes = (groups.length, groups.num_groups, groups.queries_per_group)
    sizes += (groups.denoising_sets, groups.denoising_groups, groups.queries_per_denoising_group)
    options = _constexprs(precision, head_dim, value_dim, tile)
    options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return _Plan(blocks, sizes, options)


def _precision(dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
    """How products are computed: the first key of ``_TILES``.

    Products of float32 are those of TF32 where torch may use that for matrices. Otherwise three products of TF32 stand
    for one: nearly as precise, and on tensor cores. They split each factor in two, which with wide heads does not fit
    the registers; there, products are those of float32.
    """
    if dtype != torch.float32:
        return "half"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if max(head_dim, value_dim) <= 32 else "ieee"


def _tile(kernel: triton.JITFunction, precision: str, head_dim: int, value_dim: int, queries_per_group: int) -> _Tile:
    if queries_per_group <= _SMALL_GROUP and precision != "ieee":
        return _SMALL_TILE
    return _TILES[kernel][precision][max(32, _block_dim(head_dim), _block_dim(value_dim))]


def _block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))  # 16: the least that tensor cores multiply


def _constexprs(precision: str, head_dim: int, value_dim: int, tile: _Tile) -> dict[str, int | str]:
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": _block_dim(head_dim),
        "BLOCK_DV": _block_dim(value_dim),
        "BLOCK": tile.block,
        "STEP": tile.step,
        "PRECISION": "ieee" if precision == "half" else precision,  # of no meaning to half types
    }
