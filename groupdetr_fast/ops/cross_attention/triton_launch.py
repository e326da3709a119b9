"""How the Triton kernels of ``cross_attention`` are launched: tiles, grids, and what is passed."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import has_tensor_cores
from .._triton_attention import DTYPES, MAX_DIM, Tile, constexprs_of, precision_of, width_of
from .._triton_launch import Launch, empty_as
from .reference import cross_attention_backward_reference, cross_attention_reference
from .triton_kernels import (
    _cross_attention_bwd_key_value_kernel,
    _cross_attention_bwd_query_kernel,
    _cross_attention_fwd_kernel,
    _cross_attention_order_kernel,
    _cross_attention_sum_kernel,
)

# Tiles by precision and by the widest head, such that nothing spills and 99 KB of shared memory are enough, on every
# GPU since Ampere. They are not yet chosen by measurement. Three stages, where there is room, let the rows of keys be
# looked up ahead of the keys.
_TILES = {
    _cross_attention_fwd_kernel: {
        "half": {32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3)},
        "tf32": {32: Tile(64, 64, 4, 3), 64: Tile(64, 32, 4, 3), 128: Tile(64, 16, 4, 3)},
        "tf32x3": {32: Tile(64, 32, 4)},
        "ieee": {64: Tile(32, 32, 4), 128: Tile(32, 32, 8)},
    },
    _cross_attention_bwd_query_kernel: {
        "half": {32: Tile(64, 32, 4, 3), 64: Tile(64, 32, 4, 3), 128: Tile(64, 16, 4, 3)},
        "tf32": {32: Tile(64, 64, 4, 3), 64: Tile(64, 16, 4, 3), 128: Tile(32, 32, 8)},
        "tf32x3": {32: Tile(64, 32, 4)},
        "ieee": {64: Tile(16, 16, 4), 128: Tile(32, 16, 4)},
    },
    _cross_attention_bwd_key_value_kernel: {
        "half": {32: Tile(64, 32, 4, 3), 64: Tile(64, 32, 4), 128: Tile(64, 16, 4)},
        "tf32": {32: Tile(64, 16, 4), 64: Tile(64, 16, 4), 128: Tile(32, 32, 4)},
        "tf32x3": {32: Tile(64, 16, 4)},
        "ieee": {64: Tile(32, 32, 4), 128: Tile(32, 16, 8)},
    },
}

# So many programs at least should compute gradients of keys and values, while a chunk has at least so many queries. The
# number is not that of the GPU at hand: sums would else be rounded otherwise on another one.
_PROGRAMS = 512
_QUERIES_PER_CHUNK = 512

_WALK = {"BLOCK": 1024, "num_warps": 4}  # of the kernels that go along a list, or along sums


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch; what the kernels do not cover runs on the reference."""
    if not _is_covered(query, value, scale):
        return cross_attention_reference(query, key, value, padding, dropout_p, seed, scale)
    batch, length, heads, _ = query.shape
    out = value.new_empty((batch, length, heads, value.shape[3]))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    call = _call(query, key, value, dropout_p, scale)
    strides = query.stride(), key.stride(), value.stride()
    launch = _launch(_cross_attention_fwd_kernel, strides, call, 1, length)
    if launch is not None:
        launch(out, lse, query, key, value, *_order(padding), seed)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; as :func:`forward`."""
    if not _is_covered(query, value, scale):
        return cross_attention_backward_reference(
            grad_out, query, key, value, padding, out, lse, dropout_p, seed, scale
        )
    out, lse = out.contiguous(), lse.contiguous()  # as forward returned them
    grad_query, delta = empty_as(query), empty_as(lse)
    row_words = None if seed is None else lse.new_empty((*lse.shape, 2), dtype=torch.int32)
    call = _call(query, key, value, dropout_p, scale)
    chunks, queries_per_chunk = _chunks(call)
    strided = grad_out, query, key, value
    strides = grad_out.stride(), query.stride(), key.stride(), value.stride()
    of_all = (*_order(padding), seed)
    launch = _launch(_cross_attention_bwd_query_kernel, strides, call, 1, query.shape[1])
    if launch is not None:
        launch(grad_query, delta, row_words, *strided, out, lse, *of_all)
    grads = tuple(
        tensor.new_empty((chunks, *tensor.shape), dtype=tensor.dtype if chunks == 1 else torch.float32)
        for tensor in (key, value)
    )
    launch = _launch(_cross_attention_bwd_key_value_kernel, strides, call, chunks, queries_per_chunk)
    if launch is not None:
        launch(*grads, *strided, lse, delta, row_words, *of_all)
    grad_key, grad_value = (_add_up(parts, query.dtype) for parts in grads)
    return grad_query, grad_key, grad_value


def _is_covered(query: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the kernels can do it. They find the largest score before scaling; hence the condition on ``scale``."""
    dims = query.shape[3], value.shape[3]
    fits = query.dtype in DTYPES and all(1 <= dim <= MAX_DIM for dim in dims)
    return fits and scale > 0 and has_tensor_cores(query.device)


class _Call(NamedTuple):
    """What a launch is known by, beside the strides of its tensors."""

    precision: str
    query_shape: torch.Size
    keys: int
    value_dim: int
    dropout_p: float
    scale: float


def _call(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float) -> _Call:
    value_dim = value.shape[3]
    precision = precision_of(query.dtype, query.shape[3], value_dim)
    return _Call(precision, query.shape, key.shape[1], value_dim, dropout_p, scale)


def _order(padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The list of keys of each image, ``[B, S]`` int32, and how many are not padding, ``[B]`` int32."""
    if padding is None:
        return None, None
    order = padding.new_empty(padding.shape, dtype=torch.int32)
    counts = padding.new_empty(len(padding), dtype=torch.int32)
    if len(padding):
        numbers = (*padding.stride(), padding.shape[1])
        _walk(_cross_attention_order_kernel, len(padding), *numbers)(order, counts, padding.view(torch.uint8))
    return order, counts


def _chunks(call: _Call) -> tuple[int, int]:
    """Into how many chunks the queries are cut for the gradients of keys and values, and how many are in each."""
    batch, length, heads, head_dim = call.query_shape
    tile = _tile(_cross_attention_bwd_key_value_kernel, call.precision, head_dim, call.value_dim)
    programs = max(1, batch * heads * triton.cdiv(call.keys, tile.block))
    chunks = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(length, _QUERIES_PER_CHUNK))
    queries = tile.step * triton.cdiv(length, tile.step * max(chunks, 1))
    return max(1, triton.cdiv(length, max(queries, 1))), queries


def _add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the chunks, ``[chunks, ...]`` to ``[...]``."""
    if len(parts) == 1:
        return parts[0]
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    size = total.numel()
    if size:
        _walk(_cross_attention_sum_kernel, triton.cdiv(size, _WALK["BLOCK"]), size, len(parts))(total, parts)
    return total


# The host has little time: small batches take the GPU some 20 microseconds.
@functools.lru_cache(maxsize=1024)
def _launch(
    kernel: triton.JITFunction, strides: tuple[tuple[int, ...], ...], call: _Call, chunks: int, queries_per_chunk: int
) -> Launch | None:
    """A launch of a kernel that takes tensors, their strides, and sizes; None if there is nothing to do.

    Args:
        strides: of query, key and value, in backward with those of the gradient first.
    """
    batch, length, heads, head_dim = call.query_shape
    tile = _tile(kernel, call.precision, head_dim, call.value_dim)
    rows = call.keys if kernel is _cross_attention_bwd_key_value_kernel else length
    blocks = batch * heads * triton.cdiv(rows, tile.block)
    if blocks == 0:
        return None
    numbers = (
        *(stride for of_tensor in strides for stride in of_tensor),
        heads,
        length,
        call.keys,
        queries_per_chunk,
        call.scale,
        int(call.dropout_p * 2**32),
        1 / (1 - call.dropout_p),
    )
    settings = constexprs_of(call.precision, head_dim, call.value_dim, tile) | tile.options()
    return Launch(kernel, (blocks, chunks), numbers, settings)


@functools.lru_cache(maxsize=1024)
def _walk(kernel: triton.JITFunction, blocks: int, *numbers: int) -> Launch:
    return Launch(kernel, blocks, numbers, _WALK)


def _tile(kernel: triton.JITFunction, precision: str, head_dim: int, value_dim: int) -> Tile:
    return _TILES[kernel][precision][width_of(head_dim, value_dim)]
