"""The forward pass of ms_deform_attn by products on tensor cores, on a GPU; on the CPU in tests/cuda."""

import pytest
import torch
from deformable_cases import EVERY_HALF, need_tensor_cores, on

from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_reference
from groupdetr_fast.testing import assert_matches_reference, deformable_products
from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

OP = torch.ops.groupdetr_fast.ms_deform_attn
CASES = {
    "encoder": {"queries": 2000, "dim": 32, "heads": 8, "shapes": ((30, 40), (15, 20), (8, 10), (4, 5)), "points": 4},
    "runs": {"queries": 9000, "dim": 32, "heads": 8, "batch": 3, "shapes": ((30, 40), (15, 20)), "points": 4},
    "three_heads": {"queries": 301, "dim": 32, "heads": 3, "points": 7},
    "dim_64": {"queries": 300, "dim": 64, "heads": 2, "shapes": ((9, 1), (1, 9), (17, 19)), "points": 4},
    "dim_40": {"queries": 300, "dim": 40, "shapes": ((5, 7), (0, 3), (2, 3))},
    "many_samples": {"queries": 90, "dim": 16, "points": 19},
}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _by_products():
    need_tensor_cores()
    with deformable_products(True):
        yield


@pytest.mark.parametrize("case", CASES)
@EVERY_HALF
@pytest.mark.parametrize("products", [True, False])
def test_either_kernel(case, dtype, products):
    inputs = make_inputs(**CASES[case], dtype=dtype)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with deformable_products(products), torch.profiler.profile(activities=activities) as profile:
        out = OP(*on("cuda", inputs))
        torch.cuda.synchronize()
    found = any("deform_forward_products" in event.key for event in profile.key_averages())
    assert found == products
    assert_matches_reference(out.cpu(), ms_deform_attn_reference, *inputs)


@EVERY_HALF
def test_large_weights(dtype):
    """Beyond the range of the type they are added up without tensor cores."""
    value, flat, locations, weights = make_inputs(dim=32, queries=300, dtype=dtype)
    weights[:, ::3] *= 2.0**101 if dtype == torch.bfloat16 else 2.0**6
    inputs = value, flat, locations, weights
    assert_matches_reference(OP(*on("cuda", inputs)).cpu(), ms_deform_attn_reference, *inputs)


def test_a_second_run_gives_the_same_bits():
    inputs = on("cuda", make_inputs(**CASES["runs"], dtype=torch.bfloat16))
    assert torch.equal(OP(*inputs), OP(*inputs))


def test_in_a_cuda_graph():
    inputs, others = (make_inputs(**CASES["encoder"], dtype=torch.bfloat16) for _ in range(2))
    held = on("cuda", inputs)
    OP(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(*held)
    for tensor, other in zip(held, others, strict=True):
        if torch.is_tensor(tensor):
            tensor.copy_(other)
    graph.replay()
    assert_matches_reference(out.cpu(), ms_deform_attn_reference, *others)
