"""The parts of the Triton kernels of ``grouped_attention``: who meets whom, memory, and dropout.

A program owns one block of rows of one *problem* (a head of an image) and walks, a step at a time, over the rows at the
other side of the attention matrix that these meet. Blocks do not straddle segments, so that what a program meets is at
most two ranges (see ``QueryGroups``), found by arithmetic on the numbers of the layout.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(
    num_groups,
    queries_per_group,
    denoising_sets,
    denoising_groups,
    queries_per_denoising_group,
    BLOCK: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """What this program owns, and what that meets. Its rows are keys, which meet queries, or the other way round.

    Returns:
        The problem, ``image * heads + head``; the first row that the program owns; the range ``start, stop`` of its
        segment, which it meets; a second range ``more_start, more_stop`` that it meets, possibly empty.
    """
    blocks_per_group = tl.cdiv(queries_per_group, BLOCK)
    blocks_per_denoising_group = tl.cdiv(queries_per_denoising_group, BLOCK)
    denoising_blocks = denoising_sets * denoising_groups * blocks_per_denoising_group
    blocks = denoising_blocks + num_groups * blocks_per_group
    queries_per_set = denoising_groups * queries_per_denoising_group
    first_group = denoising_sets * queries_per_set
    block = tl.program_id(0) % blocks
    if block < denoising_blocks:
        denoising_group = block // blocks_per_denoising_group
        start = denoising_group * queries_per_denoising_group
        stop = start + queries_per_denoising_group
        first = start + block % blocks_per_denoising_group * BLOCK
        more_start = first_group + denoising_group // denoising_groups * queries_per_group
        more_stop = more_start
        if not OF_KEYS:
            more_stop += queries_per_group
    else:
        block -= denoising_blocks
        group = block // blocks_per_group
        start = first_group + group * queries_per_group
        stop = start + queries_per_group
        first = start + block % blocks_per_group * BLOCK
        more_start = group * queries_per_set
        more_stop = more_start
        if OF_KEYS:
            more_stop += tl.where(group < denoising_sets, queries_per_set, 0)
    return tl.program_id(0) // blocks, first, start, stop, more_start, more_stop


@triton.jit
def count_steps(start, stop, more_start, more_stop, STEP: tl.constexpr):
    return tl.cdiv(stop - start, STEP) + tl.cdiv(more_stop - more_start, STEP)


@triton.jit
def step_at(index, start, stop, more_start, more_stop, STEP: tl.constexpr):
    """The first row of step ``index`` through the two ranges, and how many rows its range has from there on."""
    own_steps = tl.cdiv(stop - start, STEP)
    first = tl.where(index < own_steps, start + index * STEP, more_start + (index - own_steps) * STEP)
    return first, tl.where(index < own_steps, stop, more_stop) - first


@triton.jit
def of_problem(tensor, problem, num_heads, stride_b, stride_h):
    """The address of one head of one image."""
    return tensor + (problem // num_heads).to(tl.int64) * stride_b + (problem % num_heads).to(tl.int64) * stride_h


@triton.jit
def load_rows(tensor, first, count, stride_l, stride_d, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[ROWS, BLOCK_D]`` from row ``first`` on; zero after ``count`` rows and DIM channels."""
    rows, channels = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None]
    if DIM < BLOCK_D:
        mask = mask & (channels < DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_l + channels.to(tl.int64)[None, :] * stride_d
    return tl.load(tensor + first.to(tl.int64) * stride_l + offsets, mask=mask, other=0.0)


@triton.jit
def load_rows_repeating_last(
    tensor, first, count, stride_l, stride_d, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """As :func:`load_rows`, with row ``count - 1`` in place of those after it."""
    rows, channels = tl.minimum(tl.arange(0, ROWS), count - 1), tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride_l + channels.to(tl.int64)[None, :] * stride_d
    addresses = tensor + first.to(tl.int64) * stride_l + offsets
    if DIM < BLOCK_D:
        return tl.load(addresses, mask=(channels < DIM)[None, :], other=0.0)
    return tl.load(addresses)


@triton.jit
def store_rows(tensor, tile, first, count, stride_l, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of :func:`load_rows` for adjacent channels."""
    rows, channels = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None]
    if DIM < BLOCK_D:
        mask = mask & (channels < DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_l + channels[None, :]
    tl.store(tensor + first.to(tl.int64) * stride_l + offsets, tile.to(tensor.dtype.element_ty), mask=mask)


# Dropout, as dropout.py defines it. What a head, a row and a column have of their own is computed apart, so that a pair
# of row and column takes one multiply-add, one comparison and one choice. A thread of tensor cores has two rows of a
# tile: every operation of dropout_points, on a column of it, costs half an operation a score.


@triton.jit
def _word(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def dropout_head_words(seed, problem):
    """The two words of a problem."""
    bits = tl.load(seed)
    low, high, head = bits.to(tl.uint32), (bits >> 32).to(tl.uint32), problem.to(tl.uint32)
    return _word(_word(_word(low) ^ high) ^ head), _word(_word(_word(high + 0x9E3779B9) ^ low) ^ head)


@triton.jit
def dropout_slope_and_offset(head_word0, head_word1, rows):
    return _word(head_word0 ^ rows.to(tl.uint32)), _word(head_word1 ^ rows.to(tl.uint32))


@triton.jit
def store_slope_and_offset(row_words, places, slope, offset, mask):
    """Keep the words of rows in ``row_words [..., 2]``, for :func:`load_slope_and_offset`."""
    tl.store(row_words + 2 * places, slope, mask=mask)
    tl.store(row_words + 2 * places + 1, offset, mask=mask)


@triton.jit
def load_slope_and_offset(row_words, places, mask):
    slope = tl.load(row_words + 2 * places, mask=mask, other=0).to(tl.uint32)
    return slope, tl.load(row_words + 2 * places + 1, mask=mask, other=0).to(tl.uint32)


@triton.jit
def dropout_points(head_word0, columns):
    place = columns.to(tl.uint32) * 0x9E3779B9 + head_word0
    return (place * place) ^ place


@triton.jit
def is_kept(slope, offset, point, threshold):
    return slope * point + offset >= threshold.to(tl.uint32)


@triton.jit
def add_queries(
    probabilities,
    grad_probabilities,  # before dropout is heeded
    q,
    grad,
    row_delta,
    slope,
    offset,
    points,  # None without dropout, as the two before
    threshold,
    key_result,
    value_result,
    PRECISION: tl.constexpr,
):
    """What a block of queries adds to the gradients of a block of keys and of values, up to the factors of their ends.

    Scores are transposed, ``[keys, queries]``.
    """
    dropped = probabilities
    if points is not None:
        keep = is_kept(slope[None, :], offset[None, :], points[:, None], threshold)
        dropped = tl.where(keep, probabilities, 0.0)
        grad_probabilities = tl.where(keep, grad_probabilities, 0.0)
    value_result = tl.dot(dropped.to(grad.dtype), grad, value_result, input_precision=PRECISION)
    grad_scores = probabilities * (grad_probabilities - row_delta[None, :])
    key_result = tl.dot(grad_scores.to(q.dtype), q, key_result, input_precision=PRECISION)
    return key_result, value_result
