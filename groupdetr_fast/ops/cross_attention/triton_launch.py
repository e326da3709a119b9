"""How the Triton kernels of ``cross_attention`` are launched: tiles, grids, and what is passed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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

_Launch = Callable[..., None]  # of tensors


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
    strides = query.stride(), key.stride(), value.stride()
    launches = _forward_launches(strides, *_call(query, key, value, padding, dropout_p, scale))
    if launches is None:
        return cross_attention_reference(query, key, value, padding, dropout_p, seed, scale)
    batch, length, heads, _ = query.shape
    out = value.new_empty((batch, length, heads, value.shape[3]))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    launches.attend(out, lse, query, key, value, _order(padding, launches.order), seed)
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
    strides = grad_out.stride(), query.stride(), key.stride(), value.stride()
    launches = _backward_launches(strides, *_call(query, key, value, padding, dropout_p, scale))
    if launches is None:
        return cross_attention_backward_reference(
            grad_out, query, key, value, padding, out, lse, dropout_p, seed, scale
        )
    out, lse = out.contiguous(), lse.contiguous()  # as forward returned them
    grad_query, grad_key, grad_value, delta = empty_as(query), empty_as(key), empty_as(value), empty_as(lse)
    row_words = None if seed is None else lse.new_empty((*lse.shape, 2), dtype=torch.int32)
    order = _order(padding, launches.order)
    launches.of_query(grad_query, delta, row_words, grad_out, query, key, value, out, lse, order, seed)
    of_chunks = grad_key, grad_value
    if launches.chunks > 1:
        of_chunks = tuple(lse.new_empty((launches.chunks, *grad.shape)) for grad in of_chunks)
    launches.of_key_and_value(*of_chunks, grad_out, query, key, value, lse, delta, row_words, order, seed)
    if launches.chunks > 1:
        launches.sums(grad_key, grad_value, *of_chunks)
    return grad_query, grad_key, grad_value


class _Call(NamedTuple):
    """What a call is known by, beside the strides of query, key and value."""

    precision: str
    dtype: torch.dtype
    query_shape: torch.Size
    key_shape: torch.Size
    value_dim: int
    padding_strides: tuple[int, ...] | None
    dropout_p: float
    scale: float
    tensor_cores: bool

    def is_covered(self) -> bool:
        """Whether the kernels can do it. They find the largest score before scaling, hence the condition on scale."""
        dims = self.query_shape[3], self.value_dim
        fits = self.dtype in DTYPES and all(1 <= dim <= MAX_DIM for dim in dims)
        return fits and self.scale > 0 and self.tensor_cores


def _call(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout_p: float, scale: float) -> _Call:
    shape, value_dim, dtype = query.shape, value.shape[3], query.dtype
    precision = precision_of(dtype, shape[3], value_dim)
    strides = None if padding is None else padding.stride()
    tensor_cores = has_tensor_cores(query.device)
    return _Call(precision, dtype, shape, key.shape, value_dim, strides, dropout_p, scale, tensor_cores)


def _order(padding: Tensor | None, launch: _Launch) -> Tensor | None:
    """The list of the keys of each image and how many are not padding, ``[B, S + 1]`` int32."""
    if padding is None:
        return None
    images, keys = padding.shape
    order = padding.new_empty((images, keys + 1), dtype=torch.int32)
    launch(order, padding.view(torch.uint8))
    return order


class _Forward(NamedTuple):
    """The launches of a forward pass: of the list of keys, and of what reads it."""

    order: _Launch
    attend: _Launch


class _Backward(NamedTuple):
    """The launches of a backward pass.

    Attributes:
        order: the list of keys.
        of_query: goes along queries.
        of_key_and_value: goes along keys and values, in ``chunks`` of queries.
        sums: adds up what the chunks gave.
    """

    order: _Launch
    of_query: _Launch
    of_key_and_value: _Launch
    sums: _Launch
    chunks: int


_Strides = tuple[tuple[int, ...], ...]  # of query, key and value, in backward with those of the gradient first


# The host has little time: small batches take the GPU some 20 microseconds.
@functools.lru_cache(maxsize=1024)
def _forward_launches(strides: _Strides, *call: Any) -> _Forward | None:
    of_call = _Call(*call)
    if not of_call.is_covered():
        return None
    return _Forward(_order_launch(of_call), _launch(_cross_attention_fwd_kernel, strides, of_call, 1, 0))


@functools.lru_cache(maxsize=1024)
def _backward_launches(strides: _Strides, *call: Any) -> _Backward | None:
    of_call = _Call(*call)
    if not of_call.is_covered():
        return None
    chunks, in_each = _chunks(of_call)
    of_query = _launch(_cross_attention_bwd_query_kernel, strides, of_call, 1, 0)
    of_key_and_value = _launch(_cross_attention_bwd_key_value_kernel, strides, of_call, chunks, in_each)
    return _Backward(_order_launch(of_call), of_query, of_key_and_value, _sum_launch(of_call, chunks), chunks)


def _chunks(call: _Call) -> tuple[int, int]:
    """Into how many chunks the queries are cut for the gradients of keys and values, and how many are in each."""
    batch, length, heads, head_dim = call.query_shape
    tile = _tile(_cross_attention_bwd_key_value_kernel, call.precision, head_dim, call.value_dim)
    programs = max(1, batch * heads * triton.cdiv(call.key_shape[1], tile.block))
    chunks = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(length, _QUERIES_PER_CHUNK))
    queries = tile.step * triton.cdiv(length, tile.step * max(chunks, 1))
    return max(1, triton.cdiv(length, max(queries, 1))), queries


def _launch(kernel: triton.JITFunction, strides: _Strides, call: _Call, chunks: int, queries_per_chunk: int) -> _Launch:
    """A launch of a kernel that takes tensors, their strides, and sizes."""
    batch, length, heads, head_dim = call.query_shape
    keys = call.key_shape[1]
    tile = _tile(kernel, call.precision, head_dim, call.value_dim)
    rows = keys if kernel is _cross_attention_bwd_key_value_kernel else length
    numbers = (
        *(stride for of_tensor in strides for stride in of_tensor),
        heads,
        length,
        keys,
        queries_per_chunk,
        call.scale,
        int(call.dropout_p * 2**32),
        1 / (1 - call.dropout_p),
    )
    settings = constexprs_of(call.precision, head_dim, call.value_dim, tile) | tile.options()
    return _unless_empty(kernel, (batch * heads * triton.cdiv(rows, tile.block), chunks), numbers, settings)


def _order_launch(call: _Call) -> _Launch:
    images, keys = call.key_shape[:2]
    if call.padding_strides is None:
        return _nothing
    return _unless_empty(_cross_attention_order_kernel, (images,), (*call.padding_strides, keys), _WALK)


def _sum_launch(call: _Call, chunks: int) -> _Launch:
    keys = call.key_shape[:3].numel()
    sizes = keys * call.key_shape[3], keys * call.value_dim
    grid = triton.cdiv(max(sizes), _WALK["BLOCK"]), len(sizes)
    return _unless_empty(_cross_attention_sum_kernel, grid, (*sizes, chunks), _WALK)


def _unless_empty(
    kernel: triton.JITFunction, grid: tuple[int, ...], numbers: tuple[float, ...], settings: Mapping[str, Any]
) -> _Launch:
    return Launch(kernel, grid, numbers, settings) if all(grid) else _nothing


def _nothing(*tensors: Tensor | None) -> None:
    """The launch of a grid without programs."""


def _tile(kernel: triton.JITFunction, precision: str, head_dim: int, value_dim: int) -> Tile:
    return _TILES[kernel][precision][width_of(head_dim, value_dim)]
