"""How the Triton kernels of ``cross_attention`` are launched: tiles, grids, and what is passed."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import has_tensor_cores
from .reference import cross_attention_backward_reference, cross_attention_reference
from .triton_kernels import (
    _cross_attention_bwd_key_value_kernel,
    _cross_attention_bwd_query_kernel,
    _cross_attention_fwd_kernel,
    _cross_attention_order_kernel,
    _cross_attention_sum_kernel,
)


class _Tile(NamedTuple):
    """Rows that a program owns, rows that it meets at a time, warps of a program, and stages of its loads."""

    block: int
    step: int
    num_warps: int
    num_stages: int = 2


# Tiles by precision and by the widest head, such that nothing spills and 99 KB of shared memory are enough, on every
# GPU since Ampere. They are not yet chosen by measurement. Three stages, where there is room, let the rows of keys be
# looked up ahead of the keys.
_TILES = {
    _cross_attention_fwd_kernel: {
        "half": {32: _Tile(64, 64, 4, 3), 64: _Tile(64, 64, 4, 3), 128: _Tile(64, 64, 4, 3)},
        "tf32": {32: _Tile(64, 64, 4, 3), 64: _Tile(64, 32, 4, 3), 128: _Tile(64, 16, 4, 3)},
        "tf32x3": {32: _Tile(64, 32, 4)},
        "ieee": {64: _Tile(32, 32, 4), 128: _Tile(32, 32, 8)},
    },
    _cross_attention_bwd_query_kernel: {
        "half": {32: _Tile(64, 32, 4, 3), 64: _Tile(64, 32, 4, 3), 128: _Tile(64, 16, 4, 3)},
        "tf32": {32: _Tile(64, 64, 4, 3), 64: _Tile(64, 16, 4, 3), 128: _Tile(32, 32, 8)},
        "tf32x3": {32: _Tile(64, 32, 4)},
        "ieee": {64: _Tile(16, 16, 4), 128: _Tile(32, 16, 4)},
    },
    _cross_attention_bwd_key_value_kernel: {
        "half": {32: _Tile(64, 32, 4, 3), 64: _Tile(64, 32, 4), 128: _Tile(64, 16, 4)},
        "tf32": {32: _Tile(64, 16, 4), 64: _Tile(64, 16, 4), 128: _Tile(32, 32, 4)},
        "tf32x3": {32: _Tile(64, 16, 4)},
        "ieee": {64: _Tile(32, 32, 4), 128: _Tile(32, 16, 8)},
    },
}
_MAX_DIM = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# So many programs at least should compute gradients of keys and values, while a chunk has at least so many queries. The
# number is not that of the GPU at hand: sums would else be rounded otherwise on another one.
_PROGRAMS = 512
_QUERIES_PER_CHUNK = 512

_ORDER_LAUNCH = {"BLOCK": 1024, "num_warps": 4}
_SUM_LAUNCH = {"BLOCK": 1024, "num_warps": 4}


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
    out = value.new_empty(batch, length, heads, value.shape[3])
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    tensors = (out, lse, query, key, value, *_order(padding), seed)
    _launch(_cross_attention_fwd_kernel, tensors, (query, key, value), dropout_p, scale)
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
    delta = lse.new_empty(lse.shape)
    row_words = None if seed is None else lse.new_empty(*lse.shape, 2, dtype=torch.int32)
    strided = grad_out, query, key, value
    of_all = (*_order(padding), seed)
    grad_query = query.new_empty(query.shape)
    of_query = (grad_query, delta, row_words, *strided, out, lse, *of_all)
    _launch(_cross_attention_bwd_query_kernel, of_query, strided, dropout_p, scale)
    chunks, _ = _chunks(query, key, value)
    grads = tuple(
        tensor.new_empty(chunks, *tensor.shape, dtype=tensor.dtype if chunks == 1 else torch.float32)
        for tensor in (key, value)
    )
    of_key_and_value = (*grads, *strided, lse, delta, row_words, *of_all)
    _launch(_cross_attention_bwd_key_value_kernel, of_key_and_value, strided, dropout_p, scale)
    grad_key, grad_value = (_add_up(parts, query.dtype) for parts in grads)
    return grad_query, grad_key, grad_value


def _is_covered(query: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the kernels can do it. They find the largest score before scaling; hence the condition on ``scale``."""
    dims = query.shape[3], value.shape[3]
    fits = query.dtype in _DTYPES and all(1 <= dim <= _MAX_DIM for dim in dims)
    return fits and scale > 0 and has_tensor_cores(query.device)


def _order(padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The list of keys of each image, ``[B, S]`` int32, and how many are not padding, ``[B]`` int32."""
    if padding is None:
        return None, None
    order = padding.new_empty(padding.shape, dtype=torch.int32)
    counts = padding.new_empty(len(padding), dtype=torch.int32)
    if len(padding):
        as_bytes = padding.view(torch.uint8)
        _cross_attention_order_kernel[(len(padding),)](
            order, counts, as_bytes, *padding.stride(), padding.shape[1], **_ORDER_LAUNCH
        )
    return order, counts


def _chunks(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    """Into how many chunks the queries are cut for the gradients of keys and values, and how many are in each."""
    batch, length, heads, head_dim = query.shape
    dims = head_dim, value.shape[3]
    tile = _tile(_cross_attention_bwd_key_value_kernel, _precision(query.dtype, *dims), *dims)
    programs = max(1, batch * heads * triton.cdiv(key.shape[1], tile.block))
    chunks = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(length, _QUERIES_PER_CHUNK))
    queries = tile.step * triton.cdiv(length, tile.step * max(chunks, 1))
    return max(1, triton.cdiv(length, max(queries, 1))), queries


def _add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the chunks, ``[chunks, ...]`` to ``[...]``."""
    if len(parts) == 1:
        return parts[0]
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    if total.numel():
        grid = (triton.cdiv(total.numel(), int(_SUM_LAUNCH["BLOCK"])),)
        _cross_attention_sum_kernel[grid](total, parts, total.numel(), len(parts), **_SUM_LAUNCH)
    return total


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor | None, ...],
    strided: tuple[Tensor, ...],
    dropout_p: float,
    scale: float,
) -> None:
    """Launch a kernel that takes ``tensors``, the strides of ``strided`` (its end: query, key, value), and sizes."""
    query, key, value = strided[-3:]
    batch, length, heads, head_dim = query.shape
    precision = _precision(query.dtype, head_dim, value.shape[3])
    tile = _tile(kernel, precision, head_dim, value.shape[3])
    strides = []
    for tensor in strided:
        strides += tensor.stride()
    chunks, queries_per_chunk = _chunks(query, key, value)
    of_keys = kernel is _cross_attention_bwd_key_value_kernel
    blocks = batch * heads * triton.cdiv(key.shape[1] if of_keys else length, tile.block)
    if blocks == 0:
        return
    kernel[(blocks, chunks if of_keys else 1)](
        *tensors,
        *strides,
        heads,
        length,
        key.shape[1],
        queries_per_chunk,
        scale,
        int(dropout_p * 2**32),
        1 / (1 - dropout_p),
        **_options(precision, head_dim, value.shape[3], tile),
    )


@functools.lru_cache(maxsize=256)  # the host has little time: small batches take the GPU some 20 microseconds
def _options(precision: str, head_dim: int, value_dim: int, tile: _Tile) -> dict[str, int | str]:
    options = _constexprs(precision, head_dim, value_dim, tile)
    return options | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


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


def _tile(kernel: triton.JITFunction, precision: str, head_dim: int, value_dim: int) -> _Tile:
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
