"""``grouped_attention`` on NVIDIA GPUs: flash attention over the allowed rectangles of the attention matrix alone.

The algorithm is that of Dao (2023, "FlashAttention-2"). Forward keeps, besides the result, the log-sum-exp of each
query, from which backward recomputes the probabilities, first for the gradient of the queries, then for those of the
keys and values. A program owns what it writes: there are no atomics, and results are the same from run to run.

Traffic: queries and results pass through memory once; a group's keys and values (300 x 32 x 2 bytes = 19 KB each per
head in half precision) are read once per block of queries, from L2 after the first. Scores never leave the registers.
With heads of 32 channels the exponentials, not the products, are the work: hence base 2, one multiply-add for scale and
maximum, and no masks where zeros or repeated rows do as well.
"""

import triton
import triton.language as tl

from .triton_blocks import (
    LN_2,
    LOG2_E,
    add_queries,
    count_steps,
    dropout_head_words,
    dropout_points,
    dropout_slope_and_offset,
    is_kept,
    load_rows,
    load_rows_repeating_last,
    load_slope_and_offset,
    locate,
    of_problem,
    step_at,
    store_rows,
    store_slope_and_offset,
)

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
        head_word0, head_word1 = dropout_head_words(seed, problem)
        slope, offset = dropout_slope_and_offset(head_word0, head_word1, rows)
        # For a constant zero, the compiler would choose after rounding to half types, and unpack and pack these.
        unknown_zero = keep_scale * 0.0

    scale *= LOG2_E
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
            points = dropout_points(head_word0, column + tl.arange(0, STEP))
            keep = is_kept(slope[:, None], offset[:, None], points[None, :], threshold)
            probabilities = tl.where(keep, probabilities, unknown_zero)
        result = tl.dot(probabilities.to(v.dtype), v, result * correction[:, None], input_precision=PRECISION)
        largest = new_largest

    result *= (keep_scale / total)[:, None]
    store_rows(out, result, first, stop - first, num_heads * VALUE_DIM, BLOCK, VALUE_DIM, BLOCK_DV)
    tl.store(lse + problem.to(tl.int64) * length + rows, (largest + tl.log2(total)) * LN_2, mask=rows < stop)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _grouped_attention_bwd_query_kernel(
    grad_query,  # [B, L, H, D], contiguous
    delta,  # [B, H, L], contiguous: sum of out * grad_out over channels, divided by keep_scale
    row_words,  # [B, H, L, 2], contiguous: slope and offset of dropout; None without dropout
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
    # The gradients of all scores have the factor keep_scale, which the results get at the end.
    row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1) / keep_scale
    tl.store(delta + places, row_delta, mask=rows < stop)
    row_lse = tl.load(lse + places, mask=rows < stop, other=0.0) * LOG2_E
    if seed is not None:
        head_word0, head_word1 = dropout_head_words(seed, problem)
        slope, offset = dropout_slope_and_offset(head_word0, head_word1, rows)
        store_slope_and_offset(row_words, places, slope, offset, rows < stop)

    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for index in range(count_steps(start, stop, more_start, more_stop, STEP)):
        column, left = step_at(index, start, stop, more_start, more_stop, STEP)
        # Beyond the end, keys are repeated so that no probability exceeds 1, and values and delta are 0.
        k = load_rows_repeating_last(key, column, left, stride_kl, stride_kd, STEP, HEAD_DIM, BLOCK_D)
        v = load_rows(value, column, left, stride_vl, stride_vd, STEP, VALUE_DIM, BLOCK_DV)
        is_key = tl.where(tl.arange(0, STEP) < left, 1.0, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        probabilities = tl.exp2(scores * (scale * LOG2_E) - row_lse[:, None])
        grad_probabilities = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            points = dropout_points(head_word0, column + tl.arange(0, STEP))
            keep = is_kept(slope[:, None], offset[:, None], points[None, :], threshold)
            grad_probabilities = tl.where(keep, grad_probabilities, 0.0)
        grad_scores = probabilities * (grad_probabilities - row_delta[:, None] * is_key[None, :])
        result = tl.dot(grad_scores.to(k.dtype), k, result, input_precision=PRECISION)

    result *= scale * keep_scale
    store_rows(grad_query, result, first, count, num_heads * HEAD_DIM, BLOCK, HEAD_DIM, BLOCK_D)


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
    row_words,  # [B, H, L, 2], contiguous; None without dropout
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
    points = None
    if seed is not None:
        head_word0, _ = dropout_head_words(seed, problem)
        points = dropout_points(head_word0, first + tl.arange(0, BLOCK))

    key_result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    value_result = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for index in range(count_steps(start, stop, more_start, more_stop, STEP)):
        row, left = step_at(index, start, stop, more_start, more_stop, STEP)
        # Beyond the end, everything of a query is 0, and so is what it adds.
        q = load_rows(query, row, left, stride_ql, stride_qd, STEP, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row, left, stride_gl, stride_gd, STEP, VALUE_DIM, BLOCK_DV)
        is_row = tl.arange(0, STEP) < left
        places = problem.to(tl.int64) * length + row + tl.arange(0, STEP)
        row_lse = tl.load(lse + places, mask=is_row, other=0.0) * LOG2_E
        row_delta = tl.load(delta + places, mask=is_row, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        probabilities = tl.exp2(scores * (scale * LOG2_E) - row_lse[None, :])
        grad_probabilities = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        slope, offset = None, None
        if seed is not None:
            slope, offset = load_slope_and_offset(row_words, places, is_row)
        key_result, value_result = add_queries(
            probabilities,
            grad_probabilities,
            q,
            grad,
            row_delta,
            slope,
            offset,
            points,
            threshold,
            key_result,
            value_result,
            PRECISION,
        )

    key_result *= scale * keep_scale
    store_rows(grad_key, key_result, first, count, num_heads * HEAD_DIM, BLOCK, HEAD_DIM, BLOCK_D)
    store_rows(grad_value, value_result * keep_scale, first, count, num_heads * VALUE_DIM, BLOCK, VALUE_DIM, BLOCK_DV)
