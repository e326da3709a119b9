"""The backward pass of ms_deform_attn with sorted samples, by tiles and without, on a GPU; on the CPU in tests/cuda.

Samples are sorted in shared memory and without.
"""

import pytest
import torch
from deformable_cases import EVERY_HALF, need_tensor_cores, on

from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference
from groupdetr_fast.testing import assert_matches_reference, deformable_shared_sort, deformable_tiles
from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

OP_BACKWARD = torch.ops.groupdetr_fast.ms_deform_attn_backward
# Many samples for few pixels, as the kernel is for.
CASES = {
    "encoder": {"queries": 2000, "dim": 32, "heads": 8, "shapes": ((30, 40), (15, 20), (8, 10), (4, 5)), "points": 4},
    "dim_16": {"queries": 900, "dim": 16, "heads": 3, "shapes": ((17, 19),), "points": 4},
    "dim_64": {"queries": 900, "dim": 64, "heads": 2, "shapes": ((9, 1), (1, 9), (17, 19)), "points": 4},
    "dim_40": {"queries": 300, "dim": 40, "shapes": ((5, 7), (0, 3), (2, 3))},
    "dim_8": {"queries": 300, "dim": 8, "shapes": ((5, 7), (1, 1))},
}

# What is sorted always, as results are to be the same in every run; with more bins than a block has.
IN_ORDER = {name: CASES[name] for name in ("encoder", "dim_40")}
IN_ORDER["two_windows"] = {"queries": 3000, "dim": 32, "batch": 1, "shapes": ((120, 130), (3, 5)), "points": 4}

ON_GPU = torch.profiler.ProfilerActivity.CUDA
EVERY_SORT = pytest.mark.parametrize("shared_sort", [False, True], ids=["ranks", "shared_sort"])
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _by_tiles():
    need_tensor_cores()
    with deformable_tiles(True):
        yield


def make(sizes, dtype):
    """The gradient of the result and the other inputs; samples lie a little away from pixels, where slopes jump."""
    value, flat, locations, weights = make_inputs(**sizes, dtype=dtype)
    maps = torch.tensor(flat).view(-1, 2).flip(-1)[:, None]  # [levels, 1, 2], widths first
    pixels = locations.double() * maps - 0.5
    pixels = pixels.floor() + 0.01 + 0.98 * (pixels - pixels.floor())
    locations = ((pixels + 0.5) / maps.clamp(min=1)).float()
    grad = torch.randn(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]).to(dtype)
    return grad, value, flat, locations, weights


def in_double(inputs):
    return OP_BACKWARD(*(tensor.double() if torch.is_tensor(tensor) else tensor for tensor in inputs))


@pytest.mark.parametrize("case", CASES)
@EVERY_HALF
@pytest.mark.parametrize("tiles", [True, False])
@EVERY_SORT
def test_sorted_samples(case, dtype, tiles, shared_sort):
    inputs = make(CASES[case], dtype)
    ways = deformable_tiles(tiles), deformable_shared_sort(shared_sort)
    with ways[0], ways[1], torch.profiler.profile(activities=[ON_GPU]) as profile:
        grads = OP_BACKWARD(*on("cuda", inputs))
        torch.cuda.synchronize()
    kernel = "deform_backward_tiles" if tiles else "deform_backward_sorted"
    for name, expected in {kernel: True, "deform_scatter_chunks": shared_sort}.items():
        assert any(name in event.key for event in profile.key_averages()) == expected
    grads = [grad.cpu() for grad in grads]
    for index, actual in enumerate(grads):
        assert_matches_reference(actual, lambda *args, i=index: ms_deform_attn_backward_reference(*args)[i], *inputs)
    for actual, wanted in zip(grads[1:], in_double(inputs)[1:], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=2.0**-13 * wanted.abs().max().item())


@EVERY_SORT
def test_a_second_run_gives_the_same_gradients_of_samples(shared_sort):
    inputs = on("cuda", make(CASES["encoder"], torch.bfloat16))
    with deformable_shared_sort(shared_sort):
        first, second = OP_BACKWARD(*inputs), OP_BACKWARD(*inputs)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("case", IN_ORDER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_in_a_fixed_order_either_sort_gives_the_same_bits(case, dtype):
    inputs = on("cuda", make(IN_ORDER[case], dtype))
    grads = []
    for shared_sort in (False, True):
        with deformable_shared_sort(shared_sort), torch.profiler.profile(activities=[ON_GPU]) as profile:
            grads.append(OP_BACKWARD(*inputs, True))
            torch.cuda.synchronize()
        assert any("deform_scatter_chunks" in event.key for event in profile.key_averages()) == shared_sort
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@EVERY_SORT
def test_in_a_cuda_graph(shared_sort):
    inputs, others = (on("cuda", make(CASES["encoder"], torch.bfloat16)) for _ in range(2))
    with deformable_shared_sort(shared_sort):
        OP_BACKWARD(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grads = OP_BACKWARD(*inputs)
    for tensor, other in zip(inputs, others, strict=True):
        if torch.is_tensor(tensor):
            tensor.copy_(other.flip(1))
    graph.replay()
    expected = in_double(on("cpu", inputs))
    for actual, wanted in zip(grads, expected, strict=True):
        bound = 2.0**-8 if actual.dtype == torch.bfloat16 else 2.0**-13
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=0, atol=bound * wanted.abs().max().item())
