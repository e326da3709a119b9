"""The parts of the Triton kernels of ``cross_attention``: which keys there are to see, and rows of memory by number.

A kernel sees the keys of an image in the order of a list that names those which are not padding first. It stops where
these end, so that padding takes no time and no score needs a mask, wherever in the image the padding is.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["keys"])
def _cross_attention_order_kernel(
    order,  # [B, S], contiguous: keys that are not padding, then those that are
    counts,  # [B]: how many are not padding
    padding,
    stride_pb,
    stride_ps,
    keys,
    BLOCK: tl.constexpr,
):
    """The list of one image."""
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
        tl.store(order + image * keys + place, columns, mask=is_key)
        count += tl.sum(visible, 0)
    tl.store(counts + image, count)


@triton.jit
def find_list(counts, problem, num_heads, keys):
    """Where the list of the image of ``problem`` starts, and how many keys of it are not padding; all without lists."""
    image = (problem // num_heads).to(tl.int64)
    count = keys
    if counts is not None:
        count = tl.load(counts + image)
    return image * keys, count


@triton.jit
def key_rows(order, list_start, first, count, ROWS: tl.constexpr):
    """The rows of memory of the keys from place ``first`` of the list on; the last of ``count`` again after these."""
    places = first + tl.minimum(tl.arange(0, ROWS), count - 1)
    if order is not None:
        places = tl.load(order + list_start + places)
    return places


@triton.jit
def gather_rows(tensor, rows, is_row, stride_l, stride_d, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[ROWS, BLOCK_D]``; zero where ``is_row`` is false, unless that is None, and after DIM channels."""
    channels = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride_l + channels.to(tl.int64)[None, :] * stride_d
    if is_row is not None:
        mask = is_row[:, None]
        if DIM < BLOCK_D:
            mask = mask & (channels < DIM)[None, :]
        return tl.load(tensor + offsets, mask=mask, other=0.0)
    if DIM < BLOCK_D:
        return tl.load(tensor + offsets, mask=(channels < DIM)[None, :], other=0.0)
    return tl.load(tensor + offsets)


@triton.jit
def scatter_rows(tensor, tile, rows, is_row, stride_l, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of :func:`gather_rows` for adjacent channels."""
    channels = tl.arange(0, BLOCK_D)
    mask = is_row[:, None]
    if DIM < BLOCK_D:
        mask = mask & (channels < DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_l + channels[None, :]
    tl.store(tensor + offsets, tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_parts"])
def _cross_attention_sum_kernel(total, parts, size, num_parts, BLOCK: tl.constexpr):
    """``total[i]`` as the sum of ``parts[0, i]``, ``parts[1, i]`` and so on, in this order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    parts += place
    result = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_parts):
        result += tl.load(parts, mask=place < size, other=0.0)
        parts += size
    tl.store(total + place, result.to(total.dtype.element_ty), mask=place < size)
