"""The CPU kernel of ``grouped_attention``: dense attention problems, built on torch's own CPU kernels.

The allowed pairs of queries and keys form *parts*: sets of equal rectangles of the attention matrix, which fold into
the batch dimension of one dense attention call. The groups are one part. Denoising queries need two, as each sees its
own denoising group and one query group; the results of the two are merged by their log-sum-exps, so no keys are
copied. The backward pass of a part needs nothing but the merged result and log-sum-exp.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import register_kernel, without_autocast
from ...groups import QueryGroups

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Largest number of attention probabilities that exist at a time where they are computed explicitly (4 MB in float32).
_BLOCK_ELEMENTS = 1 << 20


class Part(NamedTuple):
    """``count`` rectangles of the attention matrix: rectangle i is rows ``[row + i * rows, row + (i + 1) * rows)`` and
    columns ``[key + i * keys, key + (i + 1) * keys)``."""

    count: int
    row: int
    rows: int
    key: int
    keys: int


def group_part(groups: QueryGroups) -> Part:
    """The query groups, each with itself."""
    start, size = groups.denoising_length, groups.queries_per_group
    return Part(groups.num_groups, start, size, start, size)


def denoising_parts(groups: QueryGroups) -> tuple[Part, Part]:
    """The denoising groups, each with itself; and the denoising sets, each with its query group."""
    sets, size = groups.denoising_sets, groups.queries_per_denoising_group
    own = Part(sets * groups.denoising_groups, 0, size, 0, size)
    return own, Part(sets, 0, groups.denoising_groups * size, groups.denoising_length, groups.queries_per_group)


class Settings(NamedTuple):
    """What all parts of one call share."""

    dropout_p: float
    seed: Tensor | None
    scale: float


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: list[int], dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    groups = QueryGroups.from_ints(layout)
    settings = Settings(dropout_p, seed, scale)
    out, lse = _attend(query, key, value, group_part(groups), settings)
    if groups.denoising_length:
        inputs = [tensor.to(lse.dtype) for tensor in (query, key, value)]
        merged, merged_lse = _merge(*(_attend(*inputs, part, settings) for part in denoising_parts(groups)))
        out = torch.cat([merged.to(out.dtype), out], dim=1)
        lse = torch.cat([merged_lse, lse], dim=2)
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
    groups = QueryGroups.from_ints(layout)
    settings = Settings(dropout_p, seed, scale)
    grads = _attend_backward(grad_out, query, key, value, out, lse, group_part(groups), settings)
    if groups.denoising_length:
        own, group = denoising_parts(groups)
        inputs = [tensor.to(lse.dtype) for tensor in (grad_out, query, key, value, out)]
        own_grads = _attend_backward(*inputs, lse, own, settings)
        group_grads = _attend_backward(*inputs, lse, group, settings)
        own_grads[0].add_(group_grads[0])
        grads = tuple(torch.cat([of_own.to(of.dtype), of], dim=1) for of_own, of in zip(own_grads, grads, strict=True))
        for grad, of_group in zip(grads[1:], group_grads[1:], strict=True):
            grad.narrow(1, group.key, group.count * group.keys).add_(of_group)
    return grads


def _attend(query: Tensor, key: Tensor, value: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
    """Attention of one part: ``[B, count * rows, H, Dv]`` and its log-sum-exp ``[B, H, count * rows]``."""
    folded = (
        _fold(query, part.count, part.row, part.rows),
        *(_fold(tensor, part.count, part.key, part.keys) for tensor in (key, value)),
    )
    if _uses_flash(query, value, settings):
        out, lse = _flash(*(tensor.transpose(1, 2) for tensor in folded), scale=settings.scale)
        out = out.transpose(1, 2)
    else:
        out, lse = explicit(*folded, part, settings)
    lse = lse.unflatten(0, (query.shape[0], part.count)).transpose(1, 2)  # [B, H, count, rows]
    return _unfold(out, query.shape[0], part.count), lse.flatten(2).contiguous()


def _attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Part,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one part adds to the gradients: of its queries ``[B, count * rows, H, D]``, of its keys and values."""
    grad_out, query_rows, out = (_fold(tensor, part.count, part.row, part.rows) for tensor in (grad_out, query, out))
    key_rows, value_rows = (_fold(tensor, part.count, part.key, part.keys) for tensor in (key, value))
    lse = lse.narrow(2, part.row, part.count * part.rows).unflatten(2, (part.count, part.rows))
    lse = lse.transpose(1, 2).flatten(0, 1)  # [B * count, H, rows]
    if _uses_flash(query, value, settings):
        tensors = (tensor.transpose(1, 2) for tensor in (grad_out, query_rows, key_rows, value_rows, out))
        grads = _flash_backward(*tensors, lse, 0.0, False, scale=settings.scale)
        grads = tuple(grad.transpose(1, 2) for grad in grads)
    else:
        grads = explicit_backward(grad_out, query_rows, key_rows, value_rows, out, lse, part, settings)
    return tuple(_unfold(grad, query.shape[0], part.count) for grad in grads)


def _uses_flash(query: Tensor, value: Tensor, settings: Settings) -> bool:
    return settings.seed is None and query.shape == value.shape and query.numel() > 0


def _fold(tensor: Tensor, count: int, start: int, size: int) -> Tensor:
    """``[B, L, H, D]`` to ``[B * count, size, H, D]``, a view where the strides allow."""
    folded = tensor.narrow(1, start, count * size).unflatten(1, (count, size)).flatten(0, 1)
    # torch's kernel takes the last dimension as contiguous without a check.
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def _unfold(tensor: Tensor, batch: int, count: int) -> Tensor:
    """``[B * count, size, H, D]`` to ``[B, count * size, H, D]``, contiguous."""
    return tensor.unflatten(0, (batch, count)).flatten(1, 2).contiguous()


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both from the attention over the keys of each."""
    lse = torch.logaddexp(one[1], other[1])
    weights = ((part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in (one, other))  # each [B, L, H, 1]
    return one[0] * next(weights) + other[0] * next(weights), lse


def explicit(
    query: Tensor, key: Tensor, value: Tensor, part: Part, settings: Settings, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of folded problems, a block of probabilities at a time.

    ``bias`` ``[problems, keys]`` is added to the scores: minus infinity hides a key. A problem that hides all of them
    has the result 0 and the log-sum-exp 0.
    """
    problems, rows, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(problems, rows, heads, value.shape[3])
    lse = query.new_empty(problems, heads, rows, dtype=dtype)
    for batch, row_blocks in _blocks(problems, rows, heads * key.shape[1]):
        keys, values = _by_head(key[batch], dtype), _by_head(value[batch], dtype)
        biases = _bias_by_head(bias, batch, heads)
        for block in row_blocks:
            scores = _scores(_by_head(query[batch, block], dtype), keys, biases, settings)
            largest = scores.amax(dim=-1, keepdim=True)
            if bias is not None:
                largest.masked_fill_(largest == float("-inf"), 0.0)
            exponentials = scores.sub_(largest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            if bias is not None:
                total.masked_fill_(total == 0, 1.0)
            dropped = _drop(exponentials, batch, block, heads, part, settings)
            result = torch.bmm(dropped, values).div_(total)
            out[batch, block] = _by_row(result, batch, heads)
            lse[batch, :, block] = _by_row(largest.add_(total.log_()), batch, heads)[..., 0].transpose(1, 2)
    return out, lse


def explicit_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Part,
    settings: Settings,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what :func:`explicit` computes."""
    problems, rows, heads, _ = query.shape
    dtype = lse.dtype
    grads = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    for batch, row_blocks in _blocks(problems, rows, heads * key.shape[1]):
        keys, values = _by_head(key[batch], dtype), _by_head(value[batch], dtype)
        biases = _bias_by_head(bias, batch, heads)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block in row_blocks:
            queries, grad = _by_head(query[batch, block], dtype), _by_head(grad_out[batch, block], dtype)
            delta = (grad * _by_head(out[batch, block], dtype)).sum(dim=-1, keepdim=True)
            scores = _scores(queries, keys, biases, settings)
            probabilities = scores.sub_(lse[batch, :, block].flatten(0, 1)[..., None]).exp_()
            dropped = _drop(probabilities, batch, block, heads, part, settings)
            grad_values.baddbmm_(dropped.transpose(1, 2), grad)
            grad_scores = torch.bmm(grad, values.transpose(1, 2)).mul_(dropped)
            grad_scores.addcmul_(probabilities, delta, value=-1)
            grad_keys.baddbmm_(grad_scores.transpose(1, 2), queries, alpha=settings.scale)
            grad_queries = torch.bmm(grad_scores, keys).mul_(settings.scale)
            grads[0][batch, block] = _by_row(grad_queries, batch, heads)
        for full, of_batch in zip(grads[1:], (grad_keys, grad_values), strict=True):
            full[batch] = _by_row(of_batch, batch, heads)
    return grads


def _scores(queries: Tensor, keys: Tensor, biases: Tensor | None, settings: Settings) -> Tensor:
    if biases is None:
        return torch.bmm(queries, keys.transpose(1, 2)).mul_(settings.scale)
    return torch.baddbmm(biases, queries, keys.transpose(1, 2), alpha=settings.scale)


def _bias_by_head(bias: Tensor | None, batch: slice, heads: int) -> Tensor | None:
    """``[problems, keys]`` to ``[problems * H, 1, keys]`` for the problems of ``batch``."""
    return None if bias is None else bias[batch].repeat_interleave(heads, dim=0)[:, None]


def _blocks(problems: int, rows: int, elements_per_row: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut ``problems`` x ``rows`` into blocks: ranges of problems, with ranges of rows for each."""
    rows_per_block = max(1, min(rows, _BLOCK_ELEMENTS // max(elements_per_row, 1)))
    problems_per_block = max(1, _BLOCK_ELEMENTS // max(rows * elements_per_row, 1))
    row_blocks = [slice(start, min(start + rows_per_block, rows)) for start in range(0, rows, rows_per_block)]
    for start in range(0, problems, problems_per_block):
        yield slice(start, min(start + problems_per_block, problems)), row_blocks


def _by_head(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``[problems, rows, H, D]`` to ``[problems * H, rows, D]`` of ``dtype``."""
    return tensor.transpose(1, 2).flatten(0, 1).to(dtype)


def _by_row(tensor: Tensor, batch: slice, heads: int) -> Tensor:
    """The inverse of :func:`_by_head` for the problems of ``batch``."""
    return tensor.unflatten(0, (batch.stop - batch.start, heads)).transpose(1, 2)


def _drop(probabilities: Tensor, batch: slice, block: slice, heads: int, part: Part, settings: Settings) -> Tensor:
    if settings.seed is None:
        return probabilities
    origins = []
    for problem in range(batch.start, batch.stop):
        image, index = divmod(problem, part.count)
        origins += [image, part.row + index * part.rows + block.start, part.key + index * part.keys]
    by_problem = probabilities.unflatten(0, (batch.stop - batch.start, heads))  # [problems, H, rows, keys]
    dropped = torch.ops.groupdetr_fast.attention_dropout(by_problem, settings.seed, settings.dropout_p, origins)
    return dropped.flatten(0, 1)


def register() -> None:
    """Register the kernels; the ops must have been defined."""
    register_kernel("grouped_attention", without_autocast(forward), "CPU")
    register_kernel("grouped_attention_backward", without_autocast(backward), "CPU")
