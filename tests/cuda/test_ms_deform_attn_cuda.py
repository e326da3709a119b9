"""The CUDA kernels of ms_deform_attn, run on the CPU (see tests/cuda_on_cpu)."""

import math

import emulated_ms_deform_attn
import pytest
import torch
from cuda_on_cpu.build import KernelError, build, run_with_address_sanitizer
from deformable_cases import EMPTY, grad_of_result
from emulated_ms_deform_attn import BINDING, WAYS, emulate

from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference
from groupdetr_fast.testing import assert_matches_reference
from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

KERNEL = "cuda/ms_deform_attn.cuh"
SAMPLES = "cuda/ms_deform_attn_samples.cuh"
CELLS = "cuda/ms_deform_attn_cells.cuh"
SORTING = "cuda/ms_deform_attn_sorting.cuh"
SORTED = "cuda/ms_deform_attn_sorted.cuh"
IN_ORDER = "cuda/ms_deform_attn_in_order.cuh"
OP = torch.ops.groupdetr_fast.ms_deform_attn
OP_BACKWARD = torch.ops.groupdetr_fast.ms_deform_attn_backward
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EVERY_WAY = pytest.mark.parametrize("way", WAYS)

CASES = {
    "plain": {},
    "one_of_everything": {"batch": 1, "queries": 1, "heads": 1, "dim": 1, "shapes": ((1, 1),), "points": 1},
    "encoder_like": {"queries": 17, "heads": 4, "dim": 32, "shapes": ((5, 7), (3, 4), (2, 2), (1, 1)), "points": 4},
    "dim_1": {"dim": 1, "queries": 37, "heads": 3},
    "dim_4": {"dim": 4, "points": 1},
    "dim_30": {"dim": 30, "points": 5},
    "dim_64": {"dim": 64, "batch": 1},
    "dim_71": {"dim": 71, "batch": 1, "points": 7},
    "dim_264": {"dim": 264, "batch": 1, "queries": 2},  # more than 32 vectors
    "several_tiles": {"dim": 2, "queries": 70, "heads": 1, "shapes": ((9, 40), (3, 5)), "points": 1},
    "empty_levels": {"shapes": ((0, 3), (4, 6), (2, 0), (3, 2), (0, 0))},
    "sixteen_levels": {"shapes": ((2, 3),) * 16, "points": 1, "queries": 3},
    "long_batch": {"batch": 35, "queries": 3, "heads": 1, "dim": 4},
}
TOO_WIDE_TO_SORT = {"dim_71", "dim_264"}  # the lanes of a warp do not have all channels at once


@pytest.fixture(scope="module")
def kernel():
    return emulate()


def assert_equal_to_cpu(kernel, inputs, **options):
    """The arithmetic is that of the CPU kernel; only the order of additions differs."""
    grad = grad_of_result(inputs[0], inputs[2])
    actual = kernel.forward(*inputs, **options), *kernel.backward(grad, *inputs, **options)
    assert_all_close(actual, (OP(*inputs), *OP_BACKWARD(grad, *inputs)))


def assert_all_close(actual, expected, slack=1):
    names = "out", "grad_value", "grad_locations", "grad_weights"
    for name, tensor, wanted in zip(names[-len(actual) :], actual, expected, strict=True):
        exponent = {torch.float64: -48, torch.float32: -20, torch.float16: -9, torch.bfloat16: -6}[tensor.dtype]
        scale = wanted.abs().max().item() if wanted.numel() else 0
        torch.testing.assert_close(
            tensor, wanted, rtol=0, atol=slack * 2.0**exponent * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@EVERY_WAY
def test_matches_reference_and_cpu_kernel(kernel, case, dtype, way):
    if way == "sorted" and case in TOO_WIDE_TO_SORT:
        pytest.skip("refused, as the next test sees")
    inputs = make_inputs(**CASES[case], dtype=dtype)
    grad = grad_of_result(inputs[0], inputs[2])
    out, grads = kernel.forward(*inputs, schedule=1), kernel.backward(grad, *inputs, schedule=2, way=way)
    assert_matches_reference(out, ms_deform_attn_reference, *inputs)
    for index, actual in enumerate(grads):
        assert_matches_reference(
            actual, lambda *args, i=index: ms_deform_attn_backward_reference(*args)[i], grad, *inputs
        )
    assert_all_close((out, *grads), (OP(*inputs), *OP_BACKWARD(grad, *inputs)))


@pytest.mark.parametrize("case", sorted(TOO_WIDE_TO_SORT))
def test_more_channels_than_lanes_have_at_once_are_not_sorted(kernel, case):
    inputs = make_inputs(**CASES[case])
    with pytest.raises(KernelError):
        kernel.backward(grad_of_result(inputs[0], inputs[2]), *inputs, way="sorted")


@pytest.mark.parametrize("case", EMPTY)
@EVERY_WAY
def test_empty_sizes(kernel, case, way):
    inputs = make_inputs(**EMPTY[case])
    grad = grad_of_result(inputs[0], inputs[2])
    assert (kernel.forward(*inputs) == 0).all()
    assert all((tensor == 0).all() for tensor in kernel.backward(grad, *inputs, way=way))


@pytest.mark.parametrize("case", ["plain", "encoder_like", "dim_71", "several_tiles"])
@pytest.mark.parametrize("schedule", range(5))
def test_every_schedule(kernel, case, schedule):
    inputs = make_inputs(**CASES[case])
    grad = grad_of_result(inputs[0], inputs[2])
    out = kernel.forward(*inputs, schedule=schedule)
    grads = kernel.backward(grad, *inputs, schedule=schedule)
    assert_all_close((out, *grads), (OP(*inputs), *OP_BACKWARD(grad, *inputs)))
    if case not in TOO_WIDE_TO_SORT:
        assert_all_close(kernel.backward(grad, *inputs, schedule=schedule, way="sorted"), OP_BACKWARD(grad, *inputs))
    ordered = kernel.backward(grad, *inputs, schedule=schedule, way="in_order")
    for tensor, first in zip(
        (out, *grads[1:], *ordered),
        (kernel.forward(*inputs), *grads[1:], *kernel.backward(grad, *inputs, way="in_order")),
        strict=True,
    ):
        assert torch.equal(tensor, first)


def test_order_of_atomics_shows_without_the_fixed_order(kernel):
    inputs = make_inputs(queries=40, shapes=((2, 2),))
    grad = grad_of_result(inputs[0], inputs[2])
    results = [kernel.backward(grad, *inputs, schedule=schedule)[0] for schedule in range(4)]
    assert not all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, 25.0])
@EVERY_WAY
def test_samples_that_touch_no_pixel_count_nothing(kernel, bad, way):
    value, flat, locations, weights = make_inputs()
    locations[:, :, :, :, 0, 0] = bad
    locations[:, :, :, :, 1, 1] = bad
    weights[0, :, :, :, :2] = math.nan
    inputs = value, flat, locations, weights
    rest = value, flat, locations[..., 2:, :].contiguous(), weights[..., 2:].contiguous()
    grad = grad_of_result(value, locations)
    assert_all_close([kernel.forward(*inputs)], [OP(*rest)])
    grad_value, grad_locations, grad_weights = kernel.backward(grad, *inputs, way=way)
    assert (grad_locations[..., :2, :] == 0).all()
    assert (grad_weights[..., :2] == 0).all()
    actual = grad_value, grad_locations[..., 2:, :], grad_weights[..., 2:]
    assert_all_close(actual, OP_BACKWARD(grad, *rest))


@pytest.mark.parametrize("pixel", [-1.0, -0.5, 0.0, 2.5, 3.0, 3.5, 4.0])
@EVERY_WAY
def test_samples_on_edges(kernel, pixel, way):
    value, flat, locations, weights = make_inputs(shapes=((4, 4),), dtype=torch.float64)
    locations.fill_((pixel + 0.5) / 4)
    inputs = value, flat, locations, weights
    grad = grad_of_result(value, locations)
    actual = kernel.forward(*inputs), *kernel.backward(grad, *inputs, way=way)
    assert_all_close(actual, (OP(*inputs), *OP_BACKWARD(grad, *inputs)))


def test_a_pixel_that_no_sample_touches_is_not_read(kernel):
    value, flat, locations, weights = make_inputs(shapes=((4, 6),))
    locations = locations * 0.2 + 0.1
    expected = kernel.forward(value, flat, locations, weights)
    touched = kernel.backward(torch.ones_like(expected), value, flat, locations, weights)[0]
    value[:, (touched == 0).all(dim=(0, 2, 3))] = math.nan
    assert value.isnan().any()
    assert torch.equal(kernel.forward(value, flat, locations, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_vectors_do_not_fit(kernel, dtype):
    value, flat, locations, weights = make_inputs(dtype=dtype)
    shifted = torch.empty(value.numel() + 1, dtype=dtype)[1:].view(value.shape)
    assert shifted.data_ptr() % 16 != 0
    assert_equal_to_cpu(kernel, (shifted.copy_(value), flat, locations, weights))


def test_more_images_than_a_grid_has_rows():
    small = emulate(defines=["FLOAT32_ONLY"], changes={SAMPLES: [("kMaxGridY = 65535", "kMaxGridY = 2")]})
    inputs = make_inputs(batch=5, queries=3, dim=4)
    assert_equal_to_cpu(small, inputs)
    grad = grad_of_result(inputs[0], inputs[2])
    for way in WAYS:
        assert_all_close(small.backward(grad, *inputs, way=way), OP_BACKWARD(grad, *inputs))


def test_scalar_atomics_of_older_gpus():
    older = emulate(defines=["__CUDA_ARCH__=800"])
    for dtype in DTYPES:
        assert_equal_to_cpu(older, make_inputs(dtype=dtype), schedule=1)


def run_sanitized(library, folder, dtypes=DTYPES):
    """Run a library over problems of many sizes under AddressSanitizer; return the finished process."""
    sizes = [{"dim": 32, "points": 5}, {"dim": 30}, {"dim": 71, "batch": 1}, {"shapes": ((1, 1), (0, 3))}]
    inputs = [make_inputs(dtype=dtype, **size) for dtype in dtypes for size in sizes]
    torch.save(inputs, folder / "inputs.pt")
    return run_with_address_sanitizer(emulated_ms_deform_attn.__file__, library, folder / "inputs.pt")


def test_no_access_out_of_bounds(tmp_path):
    process = run_sanitized(build(BINDING, "addresses"), tmp_path)
    assert process.returncode == 0, process.stderr


# --- Bugs planted in the kernels, each of which the tests must find ---


def change(old, new, file=KERNEL):
    return {"defines": ["FLOAT32_ONLY"], "changes": {file: [(old, new)]}}


def run_all(kernel, inputs, **options):
    grad = grad_of_result(inputs[0], inputs[2])
    kernel.forward(*inputs, **options)
    for way in WAYS:
        kernel.backward(grad, *inputs, way=way, **options)


NO_BARRIER = {
    "before the corners are read, forward": (
        "corners[group.lane] = own_sample.sample.corners;\n        __syncwarp();",
        "corners[group.lane] = own_sample.sample.corners;",
        KERNEL,
    ),
    "before the corners are read, backward": (
        "corners[group.lane] = own_sample.sample.corners;\n      __syncwarp();",
        "corners[group.lane] = own_sample.sample.corners;",
        KERNEL,
    ),
    "before the corners are overwritten": (
        "        __syncwarp();\n      }\n      if (exists &&",
        "      }\n      if (exists &&",
        KERNEL,
    ),
    "before the sums are read": (
        "      __syncwarp();\n      if (own_sample.exists) {",
        "      if (own_sample.exists) {",
        KERNEL,
    ),
    "before the corners are read, sorted": (
        "queries[group.lane] = query;\n      __syncwarp();",
        "queries[group.lane] = query;",
        SORTED,
    ),
    "before the sums are read, sorted": (
        "      __syncwarp();\n      if (exists) {",
        "      if (exists) {",
        SORTED,
    ),
    "before the sums of warps are read": (
        "totals[warp] = up_to_lane;\n      __syncthreads();",
        "totals[warp] = up_to_lane;",
        SORTING,
    ),
    "before the sums of warps are overwritten": (
        "        start += items[k];\n      }\n      __syncthreads();",
        "        start += items[k];\n      }",
        SORTING,
    ),
    "before the weights are read": (
        "          }\n          __syncwarp();\n          const int32_t end",
        "          }\n          const int32_t end",
        IN_ORDER,
    ),
    "before the weights are overwritten": (
        "          }\n          __syncwarp();\n        }\n        for (int32_t step",
        "          }\n        }\n        for (int32_t step",
        IN_ORDER,
    ),
}


@pytest.mark.parametrize("place", NO_BARRIER)
def test_missing_barrier_is_found(place):
    broken = emulate(**change(*NO_BARRIER[place]))
    with pytest.raises(KernelError, match="race in shared memory"):
        run_all(broken, make_inputs(batch=1, queries=20, heads=1, points=12, shapes=((2, 2), (68, 68))), schedule=1)


PLAIN_UPDATE = (
    "atomicAdd(reinterpret_cast<float4*>(to), values);",
    "for (int k = 0; k < 4; ++k) to[k] += (&values.x)[k];",
)


@pytest.mark.parametrize(
    ("old", "new", "message", "file"),
    [
        ("high += __shfl_xor_sync(kAllLanes,", "high += __shfl_xor_sync(0xffff,", "the mask of .* lacks", SAMPLES),
        (
            "if (sample.touches_map()) {",
            "if (!sample.touches_map()) continue;\n        {",
            "lanes disagree|deadlock",
            KERNEL,
        ),
        ("(group.lane < 4) sums", "(true) sums", "race in shared memory", KERNEL),
        ("rank[k] = atomicAdd(&of_map[bin[k]], 1)", "rank[k] = of_map[bin[k]]++", "race in global memory", SORTING),
        ("if (!__any_sync(kAllLanes, exists)) break;", "if (!exists) break;", "does not take part", SORTED),
    ],
    ids=["mask", "skipped sample", "all lanes", "rank", "some lanes leave"],
)
def test_planted_bug_is_reported(old, new, message, file):
    broken = emulate(**change(old, new, file))
    with pytest.raises(KernelError, match=message):
        run_all(broken, make_inputs(dim=32, shapes=((3, 5), (9, 15))), schedule=1)


@pytest.mark.parametrize(
    ("dim", "old", "new"),
    [(32, *PLAIN_UPDATE), (33, "atomicAdd(to + channel, weight * added[k]);", "to[channel] += weight * added[k];")],
    ids=["vector", "scalar"],
)
def test_plain_update_is_found(dim, old, new):
    broken = emulate(**change(old, new, SAMPLES))
    with pytest.raises(KernelError, match="race in global memory"):
        run_all(broken, make_inputs(dim=dim), schedule=1)


def test_lost_update_needs_preemption_to_show():
    broken = emulate(**change(*PLAIN_UPDATE, SAMPLES))
    inputs = make_inputs(queries=40, shapes=((2, 2),), dtype=torch.float32)
    assert_equal_to_cpu(broken, inputs, ignore_races=True)  # one thread after the other loses nothing
    grad = grad_of_result(inputs[0], inputs[2])
    expected = OP_BACKWARD(grad, *inputs)[0]
    results = [broken.backward(grad, *inputs, schedule=schedule, ignore_races=True)[0] for schedule in range(1, 8)]
    assert any((result - expected).abs().max() > 1e-3 for result in results)


def assert_equal_to_cpu_every_way(kernel, grad, inputs):
    assert_all_close([kernel.forward(*inputs)], [OP(*inputs)])
    for way in WAYS:
        assert_all_close(kernel.backward(grad, *inputs, way=way), OP_BACKWARD(grad, *inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "file"),
    [
        ("low_row + x.high;", "low_row + x.low;", SAMPLES),
        ("high += __shfl_xor_sync(kAllLanes, odd ? own[2] : own[3], 1)", "high += odd ? own[2] : own[3]", SAMPLES),
        ("step = kMinGroup; step <", "step = kMinGroup; 2 * step <", SAMPLES),
        ("if (lane >= step) up_to_lane += lower;", "if (lane > step) up_to_lane += lower;", SORTING),
        ("if (w < warp) start += totals[w];", "if (w + 1 < warp) start += totals[w];", SORTING),
        ("below = above + size.width + 1;", "below = above + size.width;", IN_ORDER),
        (" || shared.pixel[3] != pixels[3]", "", SORTED),
        ("other < of_map[bin + 1]; ++other", "other < of_map[bin + 1] - 1; ++other", SORTING),
    ],
    ids=["corner", "missing shuffle", "last step", "scan", "warps of a scan", "row", "cell", "last of a cell"],
)
def test_wrong_number_is_found(old, new, file):
    broken = emulate(**change(old, new, file))
    inputs = make_inputs(dim=32, queries=50, points=8, shapes=((20, 90), (3, 2), (1, 2)))
    grad = grad_of_result(inputs[0], inputs[2])
    wrong = r"Tensor-likes are not close|race in global memory"
    with pytest.raises((AssertionError, KernelError), match=wrong):
        assert_equal_to_cpu_every_way(broken, grad, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "file"),
    [
        ("high_row + x.high;", "high_row + x.low + 1;", SAMPLES),
        ("high_row = map.start + y.high * map.width", "high_row = map.start + y.high * map.height", SAMPLES),
        ("bool has_channels = channel < p.channels;", "bool has_channels = channel <= p.channels;", KERNEL),
        ("if (channel < channels) run", "if (channel <= channels) run", SAMPLES),
        ("bins.count += (map.height + int64_t{1})", "bins.count += (map.height + int64_t{0})", CELLS),
        ("begin + k <= bins ? of_map", "begin + k <= bins + 1 ? of_map", SORTING),
        ("channels % kVectorSize<T> == 0 &&", "channels % 2 == 0 &&", SAMPLES),
    ],
    ids=["corner", "row", "channel", "added channel", "cells", "scan", "vector"],
)
def test_off_by_one_is_found(old, new, file, tmp_path):
    library = build(BINDING, "addresses", **change(old, new, file))
    process = run_sanitized(library, tmp_path, dtypes=[torch.float32])
    assert process.returncode != 0
    assert "ERROR: AddressSanitizer" in process.stderr


# --- On a GPU ---

GPU_SLACK = 32  # it rounds products and sums in other places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph():
    value, flat, locations, weights = (
        tensor.cuda() if torch.is_tensor(tensor) else tensor for tensor in make_inputs(dim=32)
    )
    grad = grad_of_result(value.cpu(), locations.cpu()).cuda()
    OP_BACKWARD(grad, value, flat, locations, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(value, flat, locations, weights)
        grads = OP_BACKWARD(grad, value, flat, locations, weights)
    value.mul_(2)
    locations.add_(0.1)
    graph.replay()
    inputs = value.cpu(), flat, locations.cpu(), weights.cpu()
    assert_all_close([out.cpu()], [OP(*inputs)], GPU_SLACK)
    assert_all_close([tensor.cpu() for tensor in grads], OP_BACKWARD(grad.cpu(), *inputs), GPU_SLACK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_deterministic_on_a_gpu():
    value, flat, locations, weights = (
        tensor.cuda() if torch.is_tensor(tensor) else tensor for tensor in make_inputs(queries=2000, dim=32)
    )
    grad = grad_of_result(value.cpu(), locations.cpu()).cuda()
    results = [OP_BACKWARD(grad, value, flat, locations, weights, True) for _ in range(3)]
    for result in results[1:]:
        assert all(torch.equal(tensor, first) for tensor, first in zip(result, results[0], strict=True))
    expected = OP_BACKWARD(grad.cpu(), value.cpu(), flat, locations.cpu(), weights.cpu())
    assert_all_close([tensor.cpu() for tensor in results[0]], expected, GPU_SLACK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_too_many_levels_for_a_gpu():
    value, flat, locations, weights = (
        tensor.cuda() if torch.is_tensor(tensor) else tensor for tensor in make_inputs(shapes=((2, 3),) * 17)
    )
    with pytest.raises(RuntimeError, match="at most 16 levels, got 17"):
        OP(value, flat, locations, weights)
