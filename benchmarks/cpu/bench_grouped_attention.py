"""Decoder self-attention, forward and backward: this package against a block mask over all queries."""

import functools

import pytest
import torch

from groupdetr_fast import QueryGroups, ops
from harness import cases, naive
from harness.results import OURS

CASES = cases.ATTENTION


def with_flex_attention(query, key, value, groups):
    from torch.nn.attention.flex_attention import flex_attention

    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return flex_attention(*heads_first, block_mask=flex_mask(groups)).transpose(1, 2)


@functools.cache
def flex_mask(groups):
    from torch.nn.attention.flex_attention import create_block_mask

    size = groups.queries_per_group
    return create_block_mask(
        lambda batch, head, row, column: row // size == column // size, None, None, groups.length, groups.length, "cpu"
    )


CONTENDERS = {
    OURS: ops.grouped_attention,
    "folded SDPA": naive.folded_sdpa,
    "masked SDPA": naive.masked_sdpa,
    "explicit mask": naive.explicit_mask_attention,
    "FlexAttention": with_flex_attention,
}


def forward_backward(attend, inputs, groups, grad):
    out = attend(*inputs, groups)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def prepare(case):
    groups = QueryGroups(case.num_groups, case.num_queries)
    inputs = case.make()
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def check(result):
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        for found, expected in zip(
            result, forward_backward(naive.folded_sdpa, exact, groups, grad.double()), strict=True
        ):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

    runs = {
        name: functools.partial(forward_backward, attend, inputs, groups, grad) for name, attend in CONTENDERS.items()
    }
    return runs, check


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_grouped_attention(comparison, case, contender):
    comparison("grouped_attention", case, contender, prepare, x="num_groups")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_memory_of_grouped_attention(memory, case, contender):
    memory("grouped_attention_memory", case, contender, __name__, x="num_groups")
