"""The backward pass of ms_deform_attn by tiles on tensor cores, run on the CPU (see tests/cuda_on_cpu)."""

import ctypes
import math
import random

import emulated_ms_deform_attn
import pytest
import torch
from cuda_on_cpu.build import KernelError, build, run_with_address_sanitizer
from deformable_cases import EMPTY, EVERY_HALF, HALF, grad_of_result, missing_samples, samples_at_the_rim
from emulated_ms_deform_attn import TILES_BINDING, emulate

from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference
from groupdetr_fast.testing import assert_matches_reference
from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

TILES = "cuda/ms_deform_attn_tiles.cuh"
CORES = "cuda/tensor_cores.cuh"
SAMPLES = "cuda/ms_deform_attn_samples.cuh"
CELLS = "cuda/ms_deform_attn_cells.cuh"
SORTING = "cuda/ms_deform_attn_sorting.cuh"
OP = torch.ops.groupdetr_fast.ms_deform_attn
OP_BACKWARD = torch.ops.groupdetr_fast.ms_deform_attn_backward

CASES = {
    "plain": {},
    "one_pixel": {"batch": 1, "queries": 1, "heads": 1, "shapes": ((1, 1),), "points": 1},
    "encoder_like": {"queries": 17, "heads": 4, "dim": 32, "shapes": ((5, 7), (3, 4), (2, 2), (1, 1)), "points": 4},
    "dim_16": {"dim": 16, "queries": 37, "heads": 3},
    "dim_24": {"dim": 24, "points": 1},
    "dim_40": {"dim": 40, "points": 5},
    "dim_64": {"dim": 64, "batch": 1},
    "narrow_maps": {"dim": 32, "queries": 20, "shapes": ((1, 9), (9, 1), (2, 2), (3, 5), (1, 4), (4, 3), (6, 6))},
    "many_in_a_tile": {"dim": 32, "batch": 1, "queries": 150, "heads": 1, "shapes": ((1, 2), (2, 7)), "points": 4},
    "few_in_a_tile": {"dim": 16, "queries": 60, "heads": 1, "shapes": ((9, 40), (13, 5)), "points": 1},
    "empty_levels": {"shapes": ((0, 3), (4, 6), (2, 0), (3, 2), (0, 0))},
    "sixteen_levels": {"shapes": ((2, 3),) * 16, "points": 1, "queries": 3},
    "long_batch": {"batch": 35, "queries": 3, "heads": 1},
}
NOT_IN_TILES = {"dim_72": {"dim": 72}, "dim_30": {"dim": 30}, "wide": {"shapes": ((0, 2**28),)}}


@pytest.fixture(scope="module")
def kernel():
    return emulate(binding=TILES_BINDING)


def in_double(grad, value, flat, locations, weights):
    """The gradients by the kernel for CPUs in float64, from the same numbers."""
    return OP_BACKWARD(grad.double(), value.double(), flat, locations.double(), weights.double())


def assert_close(kernel, inputs, grad=None, exponent=-14, **options):
    """Of the largest value, sums in float32 with weights in two parts differ from float64 by 2**exponent at most."""
    grad = grad_of_result(inputs[0], inputs[2]) if grad is None else grad
    names = "grad_value", "grad_locations", "grad_weights"
    expected = in_double(grad, *inputs)
    for name, actual, wanted in zip(names, kernel.backward_tiles(grad, *inputs, **options), expected, strict=True):
        scale = wanted.abs().max().item() if wanted.numel() else 0
        torch.testing.assert_close(
            actual.double(),
            wanted,
            rtol=0,
            atol=2.0**exponent * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
@EVERY_HALF
def test_matches_reference_and_float64(kernel, case, dtype):
    inputs = make_inputs(**CASES[case], dtype=dtype)
    grad = grad_of_result(inputs[0], inputs[2])
    grads = kernel.backward_tiles(grad, *inputs, schedule=2)
    for index, actual in enumerate(grads):
        actual = actual.to(dtype) if index == 0 else actual
        assert_matches_reference(
            actual, lambda *args, i=index: ms_deform_attn_backward_reference(*args)[i], grad, *inputs
        )
    assert_close(kernel, inputs, schedule=1)


@pytest.mark.parametrize("seed", range(24))
def test_random_sizes(kernel, seed):
    chance = random.Random(seed)
    levels = [(chance.randint(0, 8), chance.randint(0, 12)) for _ in range(chance.randint(1, 5))]
    sizes = {"batch": chance.randint(1, 3), "heads": chance.randint(1, 3), "points": chance.randint(1, 5)}
    inputs = make_inputs(
        queries=chance.randint(1, 70),
        dim=8 * chance.randint(1, 8),
        shapes=levels,
        dtype=HALF[seed % 2],
        **sizes,
    )
    if seed % 3 == 0:  # most samples in few cells
        inputs[2].pow_(5)
    assert_close(kernel, inputs, schedule=seed)


@pytest.mark.parametrize("case", NOT_IN_TILES)
def test_what_does_not_fit_is_refused(kernel, case):
    inputs = make_inputs(**NOT_IN_TILES[case], dtype=torch.bfloat16)
    with pytest.raises(KernelError):
        kernel.backward_tiles(grad_of_result(inputs[0], inputs[2]), *inputs)


def test_memory_that_vectors_do_not_fit_is_refused(kernel):
    value, *samples = make_inputs(dtype=torch.bfloat16)
    shifted = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    with pytest.raises(KernelError):
        kernel.backward_tiles(grad_of_result(value, samples[1]), shifted, *samples)


@pytest.mark.parametrize("case", EMPTY)
def test_empty_sizes(kernel, case):
    inputs = make_inputs(**EMPTY[case], dtype=torch.bfloat16)
    grads = kernel.backward_tiles(grad_of_result(inputs[0], inputs[2]), *inputs)
    assert all((tensor == 0).all() for tensor in grads)


@pytest.mark.parametrize("schedule", range(6))
@pytest.mark.parametrize("case", ["encoder_like", "many_in_a_tile", "dim_64"])
def test_every_schedule(kernel, case, schedule):
    assert_close(kernel, make_inputs(**CASES[case], dtype=torch.bfloat16), schedule=schedule)


def test_the_gradients_of_locations_and_weights_do_not_depend_on_the_order(kernel):
    """In a tile, samples lie in the order in which atomics arrive; a sample's own gradients are its own sums."""
    inputs = make_inputs(**CASES["many_in_a_tile"], dtype=torch.bfloat16)
    grad = grad_of_result(inputs[0], inputs[2])
    results = [kernel.backward_tiles(grad, *inputs, schedule=schedule) for schedule in range(4)]
    for result in results[1:]:
        assert all(torch.equal(own, first) for own, first in zip(result[1:], results[0][1:], strict=True))
    assert not all(torch.equal(result[0], results[0][0]) for result in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, 25.0])
@EVERY_HALF
def test_samples_that_touch_no_pixel_count_nothing(kernel, bad, dtype):
    (value, flat, locations, weights), rest = missing_samples(bad, dtype)
    grad = grad_of_result(value, locations)
    grad_value, grad_locations, grad_weights = kernel.backward_tiles(grad, value, flat, locations, weights)
    assert (grad_locations[..., :2, :] == 0).all()
    assert (grad_weights[..., :2] == 0).all()
    expected = in_double(grad, *rest)
    for actual, wanted in zip((grad_value, grad_locations[..., 2:, :], grad_weights[..., 2:]), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=2.0**-14 * wanted.abs().max().item())


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (8, 1), (8, 2)])
@EVERY_HALF
def test_slopes_on_pixels_and_at_the_rim_are_those_of_the_other_kernels(kernel, shape, dtype):
    """Slopes jump there, so that a sample in the wrong cell shows."""
    value, flat, locations, weights = samples_at_the_rim(shape, dtype)
    inputs = value, flat, locations, weights
    grad = grad_of_result(value, locations)
    expected = OP_BACKWARD(grad.float(), value.float(), flat, locations, weights)
    grads = kernel.backward_tiles(grad, *inputs)
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2.0**-14 * wanted.abs().max().item())


@EVERY_HALF
def test_a_pixel_that_no_sample_touches_does_not_matter(kernel, dtype):
    value, flat, locations, weights = make_inputs(dim=32, shapes=((4, 6),), dtype=dtype)
    locations = locations * 0.2 + 0.1
    grad = grad_of_result(value, locations)
    expected = kernel.backward_tiles(grad, value, flat, locations, weights)
    touched = kernel.backward_tiles(torch.ones_like(grad), value, flat, locations, weights)[0]
    value[:, (touched == 0).all(dim=(0, 2, 3))] = math.nan
    assert value.isnan().any()
    for actual, wanted in zip(kernel.backward_tiles(grad, value, flat, locations, weights), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2.0**-20 * wanted.abs().max().item())


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-8, 1.0, 1.8, 2.0, 2.0**5, 2.0**17, 2.0**90])
@pytest.mark.parametrize("dim", [16, 32, 64])
@EVERY_HALF
def test_weights_of_any_size(kernel, scale, dim, dtype):
    """Small ones keep their precision, and large ones stay in range, also beside others."""
    value, flat, locations, weights = make_inputs(dim=dim, queries=40, dtype=dtype)
    weights = (weights / weights.abs().max() * scale).contiguous()
    assert_close(kernel, (value, flat, locations, weights), exponent=-12 if scale < 2.0**-10 else -14)
    some = weights.clone()
    some[:, ::3] = 1.0
    assert_close(kernel, (value, flat, locations, some))


@EVERY_HALF
def test_the_largest_weights_times_small_gradients(kernel, dtype):
    """Of one pixel, as the gradients of locations are multiples of the size of the map."""
    assert_close_with_the_largest_weights(kernel, dtype)


def assert_close_with_the_largest_weights(kernel, dtype):
    value, flat, locations, weights = make_inputs(dim=32, queries=30, shapes=((1, 1),), dtype=dtype)
    locations[:, ::2] = 0.5
    weights = torch.full_like(weights, 3.4e38)  # rounded to bfloat16 it would be infinite
    grad = (grad_of_result(value, locations) * 2.0**-14).to(dtype)
    assert_close(kernel, (value, flat, locations, weights), grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_reaches_its_pixels_alone(kernel, bad):
    value, flat, locations, weights = make_inputs(batch=1, heads=1, dim=32, queries=30, dtype=torch.bfloat16)
    weights[0, 7, 0, 0, 1] = bad
    locations[0, 7, 0, 0, 1] = torch.tensor([0.4, 0.6])
    grad = grad_of_result(value, locations)
    actual = kernel.backward_tiles(grad, value, flat, locations, weights)
    expected = OP_BACKWARD(grad.float(), value.float(), flat, locations, weights)
    for own, wanted in zip(actual, expected, strict=True):
        assert torch.equal(own.isfinite(), wanted.isfinite())
        own, wanted = own.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0)
        torch.testing.assert_close(own, wanted, rtol=0, atol=2.0**-14 * wanted.abs().max().item())


def test_divisions_without_division(kernel):
    chance = random.Random(0)
    largest = 2**31 - 1
    divisors = [*range(1, 70), 2**30 - 1, 2**30, 2**30 + 1, largest, *(chance.randint(1, largest) for _ in range(50))]
    divide = ctypes.CDLL(str(build(TILES_BINDING))).divide
    for divisor in divisors:
        numbers = [0, 1, largest, divisor - 1, divisor, largest // divisor * divisor, largest // divisor * divisor - 1]
        for number in (*numbers, *(chance.randint(0, largest) for _ in range(50))):
            assert divide(number, divisor) == number // divisor, (number, divisor)


def test_more_images_than_a_grid_has_rows():
    change = {SAMPLES: [("kMaxGridY = 65535", "kMaxGridY = 2")]}
    small = emulate(binding=TILES_BINDING, defines=["BFLOAT16_ONLY"], changes=change)
    assert_close(small, make_inputs(batch=5, queries=13, dim=16, dtype=torch.bfloat16))


def test_scalar_atomics_of_older_gpus():
    older = emulate(binding=TILES_BINDING, defines=["__CUDA_ARCH__=800"])
    for dtype in HALF:
        for dim in (8, 32, 64):
            assert_close(older, make_inputs(dtype=dtype, dim=dim), schedule=1)


def run_sanitized(library, folder, dtypes=HALF):
    sizes = [{"dim": 32, "points": 5}, {"dim": 24}, {"dim": 8}, {"dim": 48, "batch": 1}, {"shapes": ((1, 1), (0, 3))}]
    sizes += [{"dim": 64, "batch": 1, "queries": 99, "shapes": ((3, 4), (1, 1))}]
    inputs = [make_inputs(dtype=dtype, **size) for dtype in dtypes for size in sizes]
    torch.save(inputs, folder / "inputs.pt")
    return run_with_address_sanitizer(emulated_ms_deform_attn.__file__, library, folder / "inputs.pt", "tiles")


def test_no_access_out_of_bounds(tmp_path):
    process = run_sanitized(build(TILES_BINDING, "addresses"), tmp_path)
    assert process.returncode == 0, process.stderr


# --- Bugs planted in the kernel, each of which the tests must find ---


def broken_kernel(old, new, file=TILES, checks="races"):
    return emulate(checks, TILES_BINDING, defines=["BFLOAT16_ONLY"], changes={file: [(old, new)]})


WRONG_NUMBERS = {
    "weights not transposed": ("weights[2 * i] = transposed(parts.rounded);", "weights[2 * i] = parts.rounded;", TILES),
    "what rounding leaves": ("transposed(parts.rest)", "transposed(0)", TILES),
    "a number that is read back": ("word & 0xffff0000", "word", CORES),
    "rows of samples": ("{transposed(grads[0].word", "{transposed(grads[1].word", TILES),
    "next tile": ("if (!StagedPlace::share_tile(first, tile)) {", "if (tile == kNoCell) {", TILES),
    "end of the tile": ("(cell ^ other) < 4;", "(cell ^ other) < 8;", TILES),
    "level": ("static_cast<uint32_t>(level) << kLevelShift", "static_cast<uint32_t>(level / 2) << kLevelShift", TILES),
    "cell": ("number * 4 + cells % kTileCells", "number * 4 + column % kTileCells", TILES),
    "column": ("at.column_and_level << 4 >> 4) - 1", "at.column_and_level << 4 >> 4)", TILES),
    "pixel": ("size.start + y * size.width + x", "size.start + y * size.height + x", TILES),
    "touched pixel": ("touches_right = between || offset == 1;", "touches_right = between;", TILES),
    "slope": ("right - left : left - right", "right - left : left + right", TILES),
    "halves": ("first[k] = lane.odd ? other : sums[k];", "first[k] = lane.odd ? sums[k] : other;", TILES),
    "end of a walk": (
        "pixel >= 0, p.channels, lane);\n    }\n",
        "false, p.channels, lane);\n    }\n",
        TILES,
    ),
    "bins": ("cell_on_axis(x) / kCells", "(cell_on_axis(x) + 1) / kCells", SORTING),
    "large weights": ("kLargest = 0x1p100f", "kLargest = 3.40282347e38f", CORES),
    "head": ("p.heads + head) * samples", "p.heads) * samples", TILES),
}
DETECTING = {"dim": 32, "queries": 60, "points": 4, "shapes": ((5, 9), (7, 8), (3, 2), (1, 2)), "dtype": torch.bfloat16}


def assert_no_bug_shows(kernel):
    assert_close(kernel, make_inputs(**DETECTING), schedule=1)
    assert_close_with_the_largest_weights(kernel, torch.bfloat16)


def test_the_kernel_has_none_of_the_bugs_below(kernel):
    assert_no_bug_shows(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("bug", WRONG_NUMBERS)
def test_wrong_number_is_found(bug):
    wrong = "Tensor-likes are not close|race in global memory"
    with pytest.raises((AssertionError, KernelError), match=wrong):
        assert_no_bug_shows(broken_kernel(*WRONG_NUMBERS[bug]))


def assert_nothing_beyond_the_samples_shows(kernel):
    """Shared memory is full of random bytes when a block begins, of which some numbers are NaN or infinite."""
    for schedule in range(1, 6):
        assert_close(kernel, make_inputs(**CASES["long_batch"], dtype=torch.bfloat16), schedule=schedule)


def test_what_lies_beyond_the_samples(kernel):
    assert_nothing_beyond_the_samples_shows(kernel)
    with pytest.raises(AssertionError, match="grad_value: Tensor-likes are not close"):
        assert_nothing_beyond_the_samples_shows(broken_kernel("bool counts = belongs[i] && ", "bool counts = "))


NO_BARRIER = {
    "before what is staged is read": ("      __syncwarp();\n\n      Row values;", "      Row values;"),
    "before what is staged is overwritten": (
        "        __syncwarp();  // the next products",
        "        // the next products",
    ),
}


@pytest.mark.parametrize("place", NO_BARRIER)
def test_missing_barrier_is_found(place):
    change = {TILES: [NO_BARRIER[place]], SAMPLES: [("kMaxGridY = 65535", "kMaxGridY = 1")]}
    broken = emulate(binding=TILES_BINDING, defines=["BFLOAT16_ONLY"], changes=change)
    inputs = make_inputs(**DETECTING)
    with pytest.raises(KernelError, match="race in shared memory"):
        broken.backward_tiles(grad_of_result(inputs[0], inputs[2]), *inputs, schedule=1)


@pytest.mark.parametrize(
    ("old", "new", "message", "file"),
    [
        (
            "while (own < end)",
            "while (own + lane.group < end)",
            "lanes disagree about the call|does not take part",
            TILES,
        ),
        ("__shfl_xor_sync(kAllLanes, by_y, 2)", "__shfl_xor_sync(0xffff, by_y, 2)", "the mask of .* lacks", TILES),
        (
            "atomicAdd(reinterpret_cast<float4*>(to), values);",
            "for (int k = 0; k < 4; ++k) to[k] += (&values.x)[k];",
            "race in global memory",
            SAMPLES,
        ),
    ],
    ids=["some lanes leave", "mask", "plain update"],
)
def test_planted_bug_is_reported(old, new, message, file):
    inputs = make_inputs(**DETECTING)
    with pytest.raises(KernelError, match=message):
        broken_kernel(old, new, file).backward_tiles(grad_of_result(inputs[0], inputs[2]), *inputs, schedule=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "file"),
    [
        ("if (!kFull && channel(v, quarter) >= channels) continue;", "", TILES),
        ("+ channel < channels", "+ channel <= channels", TILES),
        ("x >= 0 && x < size.width", "x >= 0 && x <= size.width", TILES),
        ("return width / kCells + 1;", "return width / kCells + 2;", CELLS),
    ],
    ids=["channel", "added channel", "pixel", "bins"],
)
def test_off_by_one_is_found(old, new, file, tmp_path):
    library = build(TILES_BINDING, "addresses", defines=["BFLOAT16_ONLY"], changes={file: [(old, new)]})
    process = run_sanitized(library, tmp_path, dtypes=[torch.bfloat16])
    assert process.returncode != 0
    assert "ERROR: AddressSanitizer" in process.stderr
