"""Decoder self-attention, forward and backward: the op against a block mask over all queries."""

import cases
import pytest
import torch
from torch.nn import functional as F

from groupdetr_fast import QueryGroups, ops


def with_op(query, key, value, groups):
    return ops.grouped_attention(query, key, value, groups)


def with_masked_sdpa(query, key, value, groups):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=groups.attention_mask()).transpose(1, 2)


def with_explicit_mask(query, key, value, groups):
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~groups.attention_mask(), float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)


def with_folded_sdpa(query, key, value, groups):
    folded = (x.unflatten(1, (groups.num_groups, -1)).flatten(0, 1).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*folded).transpose(1, 2)
    return out.unflatten(0, (len(query), -1)).flatten(1, 2)


def forward_backward(attend, inputs, groups):
    return torch.autograd.grad(attend(*inputs, groups).sum(), inputs)


@pytest.mark.parametrize("attend", [with_op, with_folded_sdpa, with_masked_sdpa, with_explicit_mask])
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def bench_grouped_attention(benchmark, case, attend, threads):
    benchmark.group = f"grouped_attention {case}, {threads} threads"
    groups = QueryGroups(case.num_groups, case.num_queries)
    inputs = case.make()
    with torch.no_grad():
        expected = with_folded_sdpa(*inputs, groups)
        torch.testing.assert_close(attend(*inputs, groups), expected, rtol=1e-4, atol=1e-5)
    benchmark.pedantic(forward_backward, (attend, inputs, groups), rounds=7, warmup_rounds=1)
