"""The parts of the Triton kernels of ``cross_attention``: which keys there are to see, and rows of memory by number.

A kernel sees the keys of an image in the order of a list that names those which are not padding first, and ends with
their number. It stops where these end, so that padding takes no time and no score needs a mask, wherever in the image
the padding is.
"""

import triton
import triton.language as tl


@triton.jit
def find_list(order, problem, num_heads, keys):
    """Where the list of the image of ``problem`` starts, and how many keys of it are not padding; all without lists."""
    image = problem // num_heads
    count = keys
    if order is not None:
        count = tl.load(order + (image + 1).to(tl.int64) * keys + image)
    return image.to(tl.int64) * keys + image, count


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
