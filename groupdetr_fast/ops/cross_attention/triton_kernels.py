"""``cross_attention`` on NVIDIA GPUs: flash attention of many queries to the few keys of an image.

The algorithm and its parts are those of ``grouped_attention``; see there. What is different: keys are found by a list
without padding (``triton_blocks.py``); and as keys are few, the programs that own the gradients of keys and values
would be too few for a GPU and each have thousands of queries to walk through. Queries are therefore cut into chunks
with a program each, whose sums are added up in a fixed order: there are no atomics, and results are the same from run
to run.

Traffic: queries and results pass through memory once; the keys and values of a head (1050 x (64 + 32) x 2 bytes = 200
KB in half precision) are read once per block of queries, from L2 after the first. Scores never leave the registers.
"""

import triton
import triton.language as tl

from ..grouped_attention.triton_blocks import (
    LN_2,
    LOG2_E,
    add_queries,
    dropout_head_words,
    dropout_points,
    dropout_slope_and_offset,
    is_kept,
    load_rows,
    load_slope_and_offset,
    of_problem,
    store_rows,
    store_slope_and_offset,
)
from .triton_blocks import find_list, gather_rows, key_rows, scatter_rows

# Numbers of queries and keys change from batch to batch; their divisors are not worth a compilation each.
_NOT_SPECIALIZED = ["num_heads", "queries", "keys", "queries_per_chunk", "threshold"]


@triton.jit(do_not_specialize=["keys"])
def _cross_attention_order_kernel(
    order,  # [B, S + 1], contiguous: keys that are not padding, then those that are, and how many are not
    padding,
    stride_pb,
    stride_ps,
    keys,
    BLOCK: tl.constexpr,
):
    """The list of the keys of one image: see triton_blocks.py."""
    image = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_key = columns < keys
        address = padding + image * stride_pb + columns.to(tl.int64) * stride_ps
        visible = (tl.load(address, mask=is_key, other=1) == 0).to(tl.int32)
        visible_before = count + tl.cumsum(visible, 0) - visible
        # The first key that is padding comes last.
        place = tl.where(visible != 0, visible_before, keys - 1 - (columns - visible_before))
        tl.store(order + image * (keys + 1) + place, columns, mask=is_key)
        count += tl.sum(visible, 0)
    tl.store(order + image * (keys + 1) + keys, count)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _cross_attention_fwd_kernel(
    out,  # [B, L, H, Dv], contiguous
    lse,  # [B, H, L], contiguous
    query,
    key,
    value,
    order,  # [B, S + 1], contiguous: see above; None without padding
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
    queries,
    keys,
    queries_per_chunk,
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
    blocks = tl.cdiv(queries, BLOCK)
    problem = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    list_start, count = find_list(order, problem, num_heads, keys)
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    out = of_problem(out, problem, num_heads, queries.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    rows = first + tl.arange(0, BLOCK)
    q = load_rows(query, first, queries - first, stride_ql, stride_qd, BLOCK, HEAD_DIM, BLOCK_D)
    if seed is not None:
        head_word0, head_word1 = dropout_head_words(seed, problem)
        slope, offset = dropout_slope_and_offset(head_word0, head_word1, rows)
        # For a constant zero, the compiler would choose after rounding to half types, and unpack and pack these.
        unknown_zero = keep_scale * 0.0

    scale *= LOG2_E
    largest = tl.full([BLOCK], float("-inf"), tl.float32)  # scaled score
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for column in range(0, count, STEP):
        left = count - column
        there = key_rows(order, list_start, column, left, STEP)
        k = gather_rows(key, there, None, stride_kl, stride_kd, HEAD_DIM, BLOCK_D)
        v = gather_rows(value, there, None, stride_vl, stride_vd, VALUE_DIM, BLOCK_DV)
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

    # Without any key, result and log-sum-exp are 0.
    total = tl.where(count > 0, total, 1.0)
    result *= (keep_scale / total)[:, None]
    row_lse = tl.where(count > 0, (largest + tl.log2(total)) * LN_2, 0.0)
    store_rows(out, result, first, queries - first, num_heads * VALUE_DIM, BLOCK, VALUE_DIM, BLOCK_DV)
    tl.store(lse + problem.to(tl.int64) * queries + rows, row_lse, mask=rows < queries)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _cross_attention_bwd_query_kernel(
    grad_query,  # [B, L, H, D], contiguous
    delta,  # [B, H, L], contiguous: sum of out * grad_out over channels, divided by keep_scale
    row_words,  # [B, H, L, 2], contiguous: slope and offset of dropout; None without dropout
    grad_out,
    query,
    key,
    value,
    out,  # [B, L, H, Dv], contiguous
    lse,  # [B, H, L], contiguous
    order,
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
    queries,
    keys,
    queries_per_chunk,
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
    blocks = tl.cdiv(queries, BLOCK)
    problem = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    list_start, count = find_list(order, problem, num_heads, keys)
    grad_out = of_problem(grad_out, problem, num_heads, stride_gb, stride_gh)
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    out = of_problem(out, problem, num_heads, queries.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    grad_query = of_problem(grad_query, problem, num_heads, queries.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)
    left = queries - first
    q = load_rows(query, first, left, stride_ql, stride_qd, BLOCK, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_out, first, left, stride_gl, stride_gd, BLOCK, VALUE_DIM, BLOCK_DV)
    o = load_rows(out, first, left, num_heads * VALUE_DIM, 1, BLOCK, VALUE_DIM, BLOCK_DV)
    rows = first + tl.arange(0, BLOCK)
    places = problem.to(tl.int64) * queries + rows
    # The gradients of all scores have the factor keep_scale, which the results get at the end.
    row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1) / keep_scale
    tl.store(delta + places, row_delta, mask=rows < queries)
    row_lse = tl.load(lse + places, mask=rows < queries, other=0.0) * LOG2_E
    if seed is not None:
        head_word0, head_word1 = dropout_head_words(seed, problem)
        slope, offset = dropout_slope_and_offset(head_word0, head_word1, rows)
        store_slope_and_offset(row_words, places, slope, offset, rows < queries)

    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for column in range(0, count, STEP):
        left = count - column
        # Beyond the end, keys are repeated so that no probability exceeds 1, and values and delta are 0.
        there = key_rows(order, list_start, column, left, STEP)
        k = gather_rows(key, there, None, stride_kl, stride_kd, HEAD_DIM, BLOCK_D)
        v = gather_rows(value, there, tl.arange(0, STEP) < left, stride_vl, stride_vd, VALUE_DIM, BLOCK_DV)
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
    store_rows(grad_query, result, first, queries - first, num_heads * HEAD_DIM, BLOCK, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _cross_attention_bwd_key_value_kernel(
    grad_key,  # [chunks, B, S, H, D], contiguous
    grad_value,  # [chunks, B, S, H, Dv], contiguous
    grad_out,
    query,
    key,
    value,
    lse,  # [B, H, L], contiguous, as delta
    delta,
    row_words,  # [B, H, L, 2], contiguous; None without dropout
    order,
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
    queries,
    keys,
    queries_per_chunk,
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
    """What one chunk of queries adds to the gradients of one block of keys and values.

    Scores are transposed here, ``[keys, queries]``. The grid is (blocks of all problems, chunks).
    """
    blocks = tl.cdiv(keys, BLOCK)
    problem = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    list_start, count = find_list(order, problem, num_heads, keys)
    grad_out = of_problem(grad_out, problem, num_heads, stride_gb, stride_gh)
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    # Chunks follow one another as images do.
    chunk = tl.program_id(1) * (tl.num_programs(0) // blocks)
    grad_key = of_problem(grad_key, chunk + problem, num_heads, keys.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)
    grad_value = of_problem(
        grad_value, chunk + problem, num_heads, keys.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM
    )
    # Padding comes after the other keys; its gradients are 0. Blocks of it alone see no queries.
    there = key_rows(order, list_start, first, keys - first, BLOCK)
    places = first + tl.arange(0, BLOCK)
    k = gather_rows(key, there, places < count, stride_kl, stride_kd, HEAD_DIM, BLOCK_D)
    v = gather_rows(value, there, places < count, stride_vl, stride_vd, VALUE_DIM, BLOCK_DV)
    start = tl.program_id(1) * queries_per_chunk
    stop = tl.where(first < count, tl.minimum(start + queries_per_chunk, queries), start)
    points = None
    if seed is not None:
        head_word0, _ = dropout_head_words(seed, problem)
        points = dropout_points(head_word0, places)

    key_result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    value_result = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for index in range(tl.cdiv(stop - start, STEP)):
        row = start + index * STEP
        left = stop - row
        # Beyond the end, everything of a query is 0, and so is what it adds.
        q = load_rows(query, row, left, stride_ql, stride_qd, STEP, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row, left, stride_gl, stride_gd, STEP, VALUE_DIM, BLOCK_DV)
        is_row = tl.arange(0, STEP) < left
        at = problem.to(tl.int64) * queries + row + tl.arange(0, STEP)
        row_lse = tl.load(lse + at, mask=is_row, other=0.0) * LOG2_E
        row_delta = tl.load(delta + at, mask=is_row, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        probabilities = tl.exp2(scores * (scale * LOG2_E) - row_lse[None, :])
        grad_probabilities = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        slope, offset = None, None
        if seed is not None:
            slope, offset = load_slope_and_offset(row_words, at, is_row)
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

    visible = (places < count)[:, None]
    key_result = tl.where(visible, key_result * (scale * keep_scale), 0.0)
    value_result = tl.where(visible, value_result * keep_scale, 0.0)
    scatter_rows(grad_key, key_result, there, places < keys, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    scatter_rows(grad_value, value_result, there, places < keys, num_heads * VALUE_DIM, VALUE_DIM, BLOCK_DV)


@triton.jit(do_not_specialize=["num_parts"])
def _cross_attention_sum_kernel(
    key_total,
    value_total,
    key_parts,  # [num_parts, key_size], contiguous
    value_parts,
    key_size,
    value_size,
    num_parts,
    BLOCK: tl.constexpr,
):
    """Sums of parts, in their order. The grid is (blocks of the larger size, 2): gradients of keys, and of values."""
    if tl.program_id(1) == 0:
        _add_up(key_total, key_parts, key_size, num_parts, BLOCK)
    else:
        _add_up(value_total, value_parts, value_size, num_parts, BLOCK)


@triton.jit
def _add_up(total, parts, size, num_parts, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts += place
    result = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_parts):
        result += tl.load(parts, mask=place < size, other=0.0)
        parts += size
    tl.store(total + place, result.to(total.dtype.element_ty), mask=place < size)
