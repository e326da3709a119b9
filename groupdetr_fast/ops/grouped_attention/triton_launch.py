"""How the Triton kernels of ``grouped_attention`` are launched: tiles, grids, and what is passed."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...groups import QueryGroups
from .._triton import has_tensor_cores
from .._triton_attention import DTYPES, MAX_DIM, Tile, constexprs_of, precision_of, width_of
from .._triton_launch import Launch, empty_as
from .reference import grouped_attention_backward_reference, grouped_attention_reference
from .triton_kernels import (
    _grouped_attention_bwd_key_value_kernel,
    _grouped_attention_bwd_query_kernel,
    _grouped_attention_fwd_kernel,
)

# Tiles by precision and by the widest head, such that nothing spills and 99 KB of shared memory are enough, on every
# GPU since Ampere; those of "fma" serve older ones, with 64 KB. Those of half types and heads of 32 channels were the
# fastest of 48 on an H200, for groups of 300. Measuring them at run time instead would stall the first steps of a
# training and could not be done while a CUDA graph is captured; blocks of 64 waste little on groups of 100, 300 or 900.
_TILES = {
    _grouped_attention_fwd_kernel: {
        "half": {32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4), 128: Tile(64, 64, 4)},
        "tf32": {32: Tile(64, 64, 4), 64: Tile(64, 32, 4), 128: Tile(64, 16, 4)},
        "tf32x3": {32: Tile(64, 32, 4)},
        "ieee": {64: Tile(32, 32, 4), 128: Tile(32, 32, 8)},
        "fma": {32: Tile(64, 32, 4), 64: Tile(32, 32, 4)},
    },
    _grouped_attention_bwd_query_kernel: {
        "half": {32: Tile(64, 32, 4, 3), 64: Tile(64, 64, 4), 128: Tile(64, 32, 4)},
        "tf32": {32: Tile(64, 64, 4), 64: Tile(64, 16, 4), 128: Tile(32, 32, 8)},
        "tf32x3": {32: Tile(64, 32, 4)},
        "ieee": {64: Tile(32, 16, 4), 128: Tile(32, 16, 8)},
        "fma": {32: Tile(64, 32, 4), 64: Tile(32, 16, 4)},
    },
    _grouped_attention_bwd_key_value_kernel: {
        "half": {32: Tile(64, 32, 4, 3), 64: Tile(64, 32, 4), 128: Tile(64, 32, 4)},
        "tf32": {32: Tile(64, 16, 4), 64: Tile(64, 16, 4), 128: Tile(32, 32, 4)},
        "tf32x3": {32: Tile(64, 16, 4)},
        "ieee": {64: Tile(32, 16, 4), 128: Tile(32, 16, 8)},
        "fma": {32: Tile(64, 32, 4), 64: Tile(32, 16, 4)},
    },
}
# For groups of at most so many queries, which would leave most of a larger tile empty.
_SMALL_GROUP = 32
_SMALL_TILE = Tile(16, 16, 2)
_MAX_DIM_WITHOUT_TENSOR_CORES = 64


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: list[int], dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch; what the kernels do not cover runs on the reference."""
    call = _call(query, value, layout, dropout_p, scale)
    launch = _forward_launch((query.stride(), key.stride(), value.stride()), *call)
    if launch is None:
        return grouped_attention_reference(query, key, value, layout, dropout_p, seed, scale)
    batch, length, heads, _ = query.shape
    out = empty_as(value)
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    launch(out, lse, query, key, value, seed)
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
    strides = grad_out.stride(), query.stride(), key.stride(), value.stride()
    launches = _backward_launches(strides, *_call(query, value, layout, dropout_p, scale))
    if launches is None:
        return grouped_attention_backward_reference(
            grad_out, query, key, value, out, lse, layout, dropout_p, seed, scale
        )
    out, lse = out.contiguous(), lse.contiguous()  # as forward returned them
    grad_query, grad_key, grad_value, delta = empty_as(query), empty_as(key), empty_as(value), empty_as(lse)
    row_words = None if seed is None else lse.new_empty((*lse.shape, 2), dtype=torch.int32)
    of_query, of_key_and_value = launches
    of_query(grad_query, delta, row_words, grad_out, query, key, value, out, lse, seed)
    of_key_and_value(grad_key, grad_value, grad_out, query, key, value, lse, delta, row_words, seed)
    return grad_query, grad_key, grad_value


class _Call(NamedTuple):
    """What a call is known by, beside the strides of its tensors."""

    precision: str
    dtype: torch.dtype
    query_shape: torch.Size
    value_shape: torch.Size
    layout: tuple[int, ...]
    dropout_p: float
    scale: float
    tensor_cores: bool

    def is_covered(self) -> bool:
        """Whether the kernels can do it. They find the largest score before scaling, hence the condition on scale."""
        dims = self.query_shape[3], self.value_shape[3]
        max_dim = MAX_DIM if self.tensor_cores else _MAX_DIM_WITHOUT_TENSOR_CORES
        return self.dtype in DTYPES and all(1 <= dim <= max_dim for dim in dims) and self.scale > 0


def _call(query: Tensor, value: Tensor, layout: Sequence[int], dropout_p: float, scale: float) -> _Call:
    shape, value_shape, tensor_cores = query.shape, value.shape, has_tensor_cores(query.device)
    precision = precision_of(query.dtype, shape[3], value_shape[3], tensor_cores)
    return _Call(precision, query.dtype, shape, value_shape, tuple(layout), dropout_p, scale, tensor_cores)


_Strides = tuple[tuple[int, ...], ...]  # of query, key and value, in backward with those of the gradient first


# The host has little time: small batches take the GPU some 20 microseconds.
@functools.lru_cache(maxsize=1024)
def _forward_launch(strides: _Strides, *call: Any) -> Launch | None:
    of_call = _Call(*call)
    return _launch(_grouped_attention_fwd_kernel, strides, of_call) if of_call.is_covered() else None


@functools.lru_cache(maxsize=1024)
def _backward_launches(strides: _Strides, *call: Any) -> tuple[Launch, Launch] | None:
    """Of the kernel that goes along queries, and of the one that goes along keys and values."""
    of_call = _Call(*call)
    if not of_call.is_covered():
        return None
    of_query = _launch(_grouped_attention_bwd_query_kernel, strides, of_call)
    return of_query, _launch(_grouped_attention_bwd_key_value_kernel, strides, of_call)


def _launch(kernel: triton.JITFunction, strides: _Strides, call: _Call) -> Launch:
    """A launch of a kernel that takes tensors, their strides, and sizes."""
    batch, _, heads, head_dim = call.query_shape
    value_dim, groups = call.value_shape[3], QueryGroups.from_ints(list(call.layout))
    tile = _tile(kernel, call.precision, head_dim, value_dim, groups.queries_per_group)
    blocks = groups.num_groups * triton.cdiv(groups.queries_per_group, tile.block)
    blocks_per_denoising_group = triton.cdiv(groups.queries_per_denoising_group, tile.block)
    blocks += groups.denoising_sets * groups.denoising_groups * blocks_per_denoising_group
    numbers = (
        *(stride for of_tensor in strides for stride in of_tensor),
        heads,
        groups.length,
        groups.num_groups,
        groups.queries_per_group,
        groups.denoising_sets,
        groups.denoising_groups,
        groups.queries_per_denoising_group,
        call.scale,
        int(call.dropout_p * 2**32),
        1 / (1 - call.dropout_p),
    )
    settings = constexprs_of(call.precision, head_dim, value_dim, tile) | tile.options()
    return Launch(kernel, batch * heads * blocks, numbers, settings)


def _tile(kernel: triton.JITFunction, precision: str, head_dim: int, value_dim: int, queries_per_group: int) -> Tile:
    if queries_per_group <= _SMALL_GROUP and precision not in ("ieee", "fma"):
        return _SMALL_TILE
    return _TILES[kernel][precision][width_of(head_dim, value_dim)]
