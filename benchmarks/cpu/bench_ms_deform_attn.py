"""Multi-scale deformable attention, forward and backward."""

import functools

import pytest
import torch

from groupdetr_fast import ops
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_reference
from harness import cases
from harness.results import OURS


def with_op(value, levels, locations, weights):
    return ops.ms_deform_attn(value, levels, locations, weights)


def with_grid_sample(value, levels, locations, weights):
    return ms_deform_attn_reference(value, [size for level in levels for size in level], locations, weights)


def with_transformers(value, levels, locations, weights):
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    return MultiScaleDeformableAttention()(value, torch.tensor(levels), levels, None, locations, weights, None)


def with_torch_ms_deform_attn(value, levels, locations, weights):
    from torch_ms_deform_attn import ms_deform_attn

    shapes = torch.tensor(levels)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return ms_deform_attn(value, shapes, starts, locations, weights)


CONTENDERS = {
    OURS: with_op,
    "grid_sample": with_grid_sample,
    "transformers": with_transformers,
    "torch-ms-deform-attn": with_torch_ms_deform_attn,
}


def forward_backward(attend, inputs, levels, grad):
    value, locations, weights = inputs
    out = attend(value, levels, locations, weights)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def prepare(case):
    inputs, levels = case.make(), list(case.levels)
    value, _, weights = inputs
    shape = value.shape[0], weights.shape[1], value.shape[2] * value.shape[3]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def check(result):
        for found, exact in zip(result, expected(), strict=True):
            # Slopes of locations are differences of pixels times the width of the map, which cancel.
            torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())

    @functools.cache
    def expected():
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        return forward_backward(with_grid_sample, exact, levels, grad.double())

    runs = {
        name: functools.partial(forward_backward, attend, inputs, levels, grad) for name, attend in CONTENDERS.items()
    }
    return runs, check


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", cases.DEFORMABLE, ids=str)
def bench_ms_deform_attn(comparison, case, contender):
    comparison("ms_deform_attn", case, contender, prepare, seconds=40)
