"""The backward pass of ``grouped_attention`` in one kernel, for groups of few queries.

The kernels of triton_kernels.py compute every score and its gradient twice, first for the gradients of queries, then
for those of keys and values: seven products of matrices and two exponentials. Here a program owns a group of a problem
(a head of an image), so that five products and one exponential do. It walks along the queries with a block of keys and
values, whose gradients it adds up in registers, and writes the gradients of the queries as it goes. A group of more
keys than a block takes several *passes*, one after another, between which the sums for the queries wait in memory, in
float32. All sums have one order: there are no atomics, and results are the same from run to run.

Scores are transposed, ``[keys, queries]``. So the probabilities and the gradients of the scores are in the registers
from which the products for values and keys take them; those for the queries alone pass through shared memory.
"""

import triton
import triton.language as tl

from .triton_blocks import (
    LOG2_E,
    add_queries,
    dropout_head_words,
    dropout_points,
    dropout_slope_and_offset,
    load_rows,
    load_rows_repeating_last,
    load_slope_and_offset,
    of_problem,
    store_rows,
    store_slope_and_offset,
)

__all__ = ["MAX_TILE"]

MAX_TILE = 64  # keys that meet queries at a time; four warps of 16 rows, as tensor cores have them


@triton.jit(do_not_specialize=["num_heads", "length", "num_groups", "queries_per_group", "threshold"])
def _grouped_attention_bwd_one_block_kernel(
    grad_query,  # [B, L, H, D], contiguous
    grad_key,  # [B, L, H, D], contiguous
    grad_value,  # [B, L, H, Dv], contiguous
    sums,  # [B, L, H, D], contiguous: of the gradient of queries between passes; None if one pass is enough
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
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one group of one problem: its keys are TILES tiles of TILE, of which a pass takes BLOCK keys."""
    problem = tl.program_id(0) // num_groups
    start = tl.program_id(0) % num_groups * queries_per_group
    stop = start + queries_per_group
    grad_out = of_problem(grad_out, problem, num_heads, stride_gb, stride_gh)
    query = of_problem(query, problem, num_heads, stride_qb, stride_qh)
    key = of_problem(key, problem, num_heads, stride_kb, stride_kh)
    value = of_problem(value, problem, num_heads, stride_vb, stride_vh)
    out = of_problem(out, problem, num_heads, length.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    grad_query = of_problem(grad_query, problem, num_heads, length.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)
    grad_key = of_problem(grad_key, problem, num_heads, length.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)
    grad_value = of_problem(grad_value, problem, num_heads, length.to(tl.int64) * num_heads * VALUE_DIM, VALUE_DIM)
    lse += problem.to(tl.int64) * length
    head_word0 = None
    if seed is not None:
        head_word0, head_word1 = dropout_head_words(seed, problem)
        row_words += 2 * problem.to(tl.int64) * length
        for index in tl.static_range(TILES):
            rows = start + index * TILE + tl.arange(0, TILE)
            slope, offset = dropout_slope_and_offset(head_word0, head_word1, rows)
            store_slope_and_offset(row_words, rows, slope, offset, rows < stop)
        tl.debug_barrier()  # other threads will read what is written here
    if sums is not None:
        sums = of_problem(sums, problem, num_heads, length.to(tl.int64) * num_heads * HEAD_DIM, HEAD_DIM)

    # Operators of constants alone give constants in every version of Triton, tl.cdiv and min do not.
    for index in tl.static_range((TILES * TILE + BLOCK - 1) // BLOCK):
        if index > 0:
            tl.debug_barrier()  # as above, of the sums
        _pass(
            grad_query,
            grad_key,
            grad_value,
            sums,
            row_words,
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            seed,
            stride_gl,
            stride_gd,
            stride_ql,
            stride_qd,
            stride_kl,
            stride_kd,
            stride_vl,
            stride_vd,
            num_heads,
            start,
            stop,
            scale,
            threshold,
            keep_scale,
            head_word0,
            HEAD_DIM=HEAD_DIM,
            VALUE_DIM=VALUE_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
            STEP=STEP,
            TILE=TILE,
            FIRST_TILE=index * (BLOCK // TILE),
            STOP_TILE=(index + 1) * (BLOCK // TILE) if (index + 1) * BLOCK < TILES * TILE else TILES,
            TILES=TILES,
            PRECISION=PRECISION,
        )


@triton.jit
def _pass(
    grad_query,
    grad_key,
    grad_value,
    sums,
    row_words,
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    seed,
    stride_gl,
    stride_gd,
    stride_ql,
    stride_qd,
    stride_kl,
    stride_kd,
    stride_vl,
    stride_vd,
    num_heads,
    start,
    stop,
    scale,
    threshold,
    keep_scale,
    head_word0,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    FIRST_TILE: tl.constexpr,
    STOP_TILE: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys from tile FIRST_TILE to before STOP_TILE of a group's TILES tiles, along all queries of the group."""
    keys, values, key_results, value_results = (), (), (), ()
    for tile in tl.static_range(FIRST_TILE, STOP_TILE):
        first = start + tile * TILE
        # Beyond the end, keys are repeated so that no probability exceeds 1, and values and delta are 0.
        k = load_rows_repeating_last(key, first, stop - first, stride_kl, stride_kd, TILE, HEAD_DIM, BLOCK_D)
        v = load_rows(value, first, stop - first, stride_vl, stride_vd, TILE, VALUE_DIM, BLOCK_DV)
        keys += (k,)
        values += (v,)
        key_results += (tl.zeros([TILE, BLOCK_D], tl.float32),)
        value_results += (tl.zeros([TILE, BLOCK_DV], tl.float32),)

    for index in range(tl.cdiv(stop - start, STEP)):
        row = start + index * STEP
        left = stop - row
        # Beyond the end, everything of a query is 0, and so is what it adds.
        q = load_rows(query, row, left, stride_ql, stride_qd, STEP, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row, left, stride_gl, stride_gd, STEP, VALUE_DIM, BLOCK_DV)
        o = load_rows(out, row, left, num_heads * VALUE_DIM, 1, STEP, VALUE_DIM, BLOCK_DV)
        rows = row + tl.arange(0, STEP)
        row_lse = tl.load(lse + rows, mask=rows < stop, other=0.0) * LOG2_E
        # The gradients of all scores have the factor keep_scale, which the results get at the end.
        row_delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1) / keep_scale
        slope, offset = None, None
        if seed is not None:
            slope, offset = load_slope_and_offset(row_words, rows, rows < stop)

        new_key_results, new_value_results = (), ()
        result = tl.zeros([BLOCK_D, STEP], tl.float32)  # of the queries, transposed
        for tile in tl.static_range(FIRST_TILE, STOP_TILE):
            first = start + tile * TILE
            k, v = keys[tile - FIRST_TILE], values[tile - FIRST_TILE]
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            probabilities = tl.exp2(scores * (scale * LOG2_E) - row_lse[None, :])
            grad_probabilities = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            is_key, points = None, None
            if tile == TILES - 1:
                is_key = tl.where(tl.arange(0, TILE) < stop - first, 1.0, 0.0)
            if seed is not None:
                points = dropout_points(head_word0, first + tl.arange(0, TILE))
            grad_scores, key_result, value_result = add_queries(
                probabilities,
                grad_probabilities,
                q,
                grad,
                row_delta,
                is_key,
                slope,
                offset,
                points,
                threshold,
                key_results[tile - FIRST_TILE],
                value_results[tile - FIRST_TILE],
                PRECISION,
            )
            # Triton lays out products that feed each other alike, here along the keys. Across a transposition it does
            # not look; else all warps would compute this product, whose rows are queries, twice.
            result += tl.trans(tl.dot(tl.trans(grad_scores), k, input_precision=PRECISION))
            new_key_results += (key_result,)
            new_value_results += (value_result,)
        key_results, value_results = new_key_results, new_value_results

        result = tl.trans(result)
        if FIRST_TILE > 0:
            result += load_rows(sums, row, left, num_heads * HEAD_DIM, 1, STEP, HEAD_DIM, BLOCK_D)
        if STOP_TILE < TILES:
            store_rows(sums, result, row, left, num_heads * HEAD_DIM, STEP, HEAD_DIM, BLOCK_D)
        else:
            result *= scale * keep_scale
            store_rows(grad_query, result, row, left, num_heads * HEAD_DIM, STEP, HEAD_DIM, BLOCK_D)

    for tile in tl.static_range(FIRST_TILE, STOP_TILE):
        first = start + tile * TILE
        key_result = key_results[tile - FIRST_TILE] * (scale * keep_scale)
        value_result = value_results[tile - FIRST_TILE] * keep_scale
        store_rows(grad_key, key_result, first, stop - first, num_heads * HEAD_DIM, TILE, HEAD_DIM, BLOCK_D)
        store_rows(grad_value, value_result, first, stop - first, num_heads * VALUE_DIM, TILE, VALUE_DIM, BLOCK_DV)
