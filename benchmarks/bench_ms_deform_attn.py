"""Multi-scale deformable attention, forward and backward: the op against its grid_sample reference."""

import cases
import pytest
import torch

from groupdetr_fast import ops
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_reference


def with_op(value, levels, locations, weights):
    return ops.ms_deform_attn(value, levels, locations, weights)


def with_grid_sample(value, levels, locations, weights):
    return ms_deform_attn_reference(value, [size for level in levels for size in level], locations, weights)


def forward_backward(attend, inputs, levels):
    value, locations, weights = inputs
    return torch.autograd.grad(attend(value, levels, locations, weights).sum(), inputs)


@pytest.mark.parametrize("attend", [with_op, with_grid_sample])
@pytest.mark.parametrize("case", cases.DEFORMABLE, ids=str)
def bench_ms_deform_attn(benchmark, case, attend, threads):
    benchmark.group = f"ms_deform_attn {case}, {threads} threads"
    inputs, levels = case.make(), list(case.levels)
    for ours, reference in zip(
        forward_backward(attend, inputs, levels), forward_backward(with_grid_sample, inputs, levels), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)
    benchmark.pedantic(forward_backward, (attend, inputs, levels), rounds=5, warmup_rounds=1)
