"""The forward pass of ms_deform_attn by products on tensor cores, run on the CPU (see tests/cuda_on_cpu)."""

import ctypes
import math
import random
from contextlib import nullcontext

import emulated_ms_deform_attn
import pytest
import torch
from cuda_on_cpu.build import KernelError, Library, build, run_with_address_sanitizer
from deformable_cases import EMPTY, EVERY_HALF, HALF, missing_samples, samples_at_the_rim
from emulated_ms_deform_attn import PRODUCTS_BINDING, Problem, emulate

from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_reference
from groupdetr_fast.testing import assert_matches_reference
from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

PRODUCTS = "cuda/ms_deform_attn_products.cuh"
CORES = "cuda/tensor_cores.cuh"
SAMPLES = "cuda/ms_deform_attn_samples.cuh"
OP = torch.ops.groupdetr_fast.ms_deform_attn
OP_BACKWARD = torch.ops.groupdetr_fast.ms_deform_attn_backward

CASES = {
    "plain": {},
    "one_pixel": {"batch": 1, "queries": 1, "heads": 1, "shapes": ((1, 1),), "points": 1},
    "encoder_like": {"queries": 17, "heads": 4, "dim": 32, "shapes": ((5, 7), (3, 4), (2, 2), (1, 1)), "points": 4},
    "three_heads": {"dim": 32, "heads": 3, "points": 7, "queries": 40},
    "dim_8": {"dim": 8, "queries": 37, "heads": 5},
    "dim_24": {"dim": 24, "points": 1},
    "dim_40": {"dim": 40, "points": 5},
    "dim_64": {"dim": 64, "batch": 1},
    "dim_136": {"dim": 136, "batch": 1, "queries": 5},
    "many_samples": {"dim": 16, "queries": 9, "points": 19},
    "narrow_maps": {"dim": 32, "queries": 20, "shapes": ((1, 9), (9, 1), (2, 2), (3, 5), (1, 4), (4, 3), (6, 6))},
    "empty_levels": {"shapes": ((0, 3), (4, 6), (2, 0), (3, 2), (0, 0))},
    "sixteen_levels": {"shapes": ((2, 3),) * 16, "points": 1, "queries": 3},
    "long_batch": {"batch": 35, "queries": 3, "heads": 1},
}
RUNS = {PRODUCTS: [("kEnoughBlocks = 4096", "kEnoughBlocks = 1")]}  # so that a warp has several queries


@pytest.fixture(scope="module")
def kernel():
    return emulate(binding=PRODUCTS_BINDING)


@pytest.fixture(scope="module")
def in_runs():
    return emulate(binding=PRODUCTS_BINDING, changes=RUNS)


def assert_close(kernel, inputs, **options):
    """A result is the sum in float64, rounded, or nearly so: sums in float32 of weights in two parts are so good."""
    value, flat, locations, weights = inputs
    actual = kernel.forward_products(*inputs, **options)
    expected = OP(value.double(), flat, locations.double(), weights.double())
    scale = expected.abs().max().item() if expected.numel() else 0
    kind = torch.finfo(value.dtype)
    subnormal = kind.smallest_normal * kind.eps / 2
    torch.testing.assert_close(
        actual.double(), expected, rtol=kind.eps / 2 * (1 + 2.0**-5), atol=2.0**-14 * scale + subnormal
    )


@pytest.mark.parametrize("case", CASES)
@EVERY_HALF
def test_matches_reference_and_float64(kernel, in_runs, case, dtype):
    inputs = make_inputs(**CASES[case], dtype=dtype)
    assert_matches_reference(kernel.forward_products(*inputs, schedule=2), ms_deform_attn_reference, *inputs)
    assert_close(kernel, inputs, schedule=1)
    assert_close(in_runs, inputs, schedule=3)


@pytest.mark.parametrize("seed", range(24))
def test_random_sizes(kernel, in_runs, seed):
    chance = random.Random(seed)
    levels = [(chance.randint(0, 8), chance.randint(0, 12)) for _ in range(chance.randint(1, 5))]
    sizes = {"batch": chance.randint(1, 3), "heads": chance.randint(1, 5), "points": chance.randint(1, 9)}
    inputs = make_inputs(
        queries=chance.randint(1, 70), dim=8 * chance.randint(1, 9), shapes=levels, dtype=HALF[seed % 2], **sizes
    )
    assert_close((kernel, in_runs)[seed // 2 % 2], inputs, schedule=seed)


@pytest.mark.parametrize("dim", [4, 30])
def test_what_does_not_fit_is_refused(kernel, dim):
    with pytest.raises(KernelError):
        kernel.forward_products(*make_inputs(dim=dim, dtype=torch.bfloat16))


def test_more_rows_of_16_bytes_than_32_bits_number_are_refused():
    library = Library(build(PRODUCTS_BINDING))
    for pixels, refused in ((2**27 - 1, False), (2**27, True)):
        problem = Problem(1, pixels, 8, 32, 0, 1, 1)  # no queries, so that nothing is read
        with pytest.raises(KernelError) if refused else nullcontext():
            library.call("forward_products_bfloat16", ctypes.byref(problem), *[ctypes.c_void_p(None)] * 4)


def test_memory_that_vectors_do_not_fit_is_refused(kernel):
    value, *samples = make_inputs(dtype=torch.bfloat16)
    shifted = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    with pytest.raises(KernelError):
        kernel.forward_products(shifted, *samples)


@pytest.mark.parametrize("case", EMPTY)
def test_empty_sizes(kernel, case):
    inputs = make_inputs(**EMPTY[case], dtype=torch.bfloat16)
    assert (kernel.forward_products(*inputs) == 0).all()


@pytest.mark.parametrize("schedule", range(6))
@pytest.mark.parametrize("case", ["encoder_like", "three_heads", "dim_64", "many_samples"])
def test_every_schedule_gives_the_same(in_runs, case, schedule):
    inputs = make_inputs(**CASES[case], dtype=torch.bfloat16)
    assert torch.equal(in_runs.forward_products(*inputs, schedule=schedule), in_runs.forward_products(*inputs))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, 25.0])
@EVERY_HALF
def test_samples_that_touch_no_pixel_count_nothing(kernel, bad, dtype):
    inputs, rest = missing_samples(bad, dtype, within=(0.6, 0.9))
    inputs[0][:, 0] = math.inf  # a pixel that nothing touches may not matter either
    expected = kernel.forward_products(*rest)
    assert expected.isfinite().all()
    assert torch.equal(kernel.forward_products(*inputs), expected)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (8, 1), (8, 2)])
@EVERY_HALF
def test_samples_on_pixels_and_at_the_rim(kernel, shape, dtype):
    assert_close(kernel, samples_at_the_rim(shape, dtype))


@EVERY_HALF
def test_a_pixel_that_no_sample_touches_is_not_read(kernel, dtype):
    value, flat, locations, weights = make_inputs(dim=32, shapes=((4, 6),), dtype=dtype)
    locations = locations * 0.2 + 0.1
    expected = kernel.forward_products(value, flat, locations, weights)
    touched = OP_BACKWARD(torch.ones_like(expected), value, flat, locations, weights, False)[0]
    value[:, (touched == 0).all(dim=(0, 2, 3))] = math.nan
    assert value.isnan().any()
    assert torch.equal(kernel.forward_products(value, flat, locations, weights), expected)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-8, 1.0, 1.8, 2.0, 2.0**5, 2.0**13, 2.0**90])
@pytest.mark.parametrize("dim", [16, 64])
def test_weights_of_any_size(kernel, scale, dim):
    """Small ones keep their precision, and large ones stay in range, also beside others."""
    value, flat, locations, weights = make_inputs(dim=dim, queries=40, dtype=torch.bfloat16)
    weights = (weights / weights.abs().max() * scale).contiguous()
    assert_close(kernel, (value, flat, locations, weights))
    weights[:, ::3] = 1.0
    assert_close(kernel, (value, flat, locations, weights))


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-8, 1.0, 1.8, 2.0, 2.0**5, 2.0**13])
def test_weights_of_any_size_in_float16(kernel, scale):
    value, flat, locations, weights = make_inputs(dim=32, queries=40, dtype=torch.float16)
    weights = (weights / weights.abs().max() * scale).contiguous()
    value *= 2.0**-3 if scale > 1 else 1
    assert_close(kernel, (value, flat, locations, weights))
    weights[:, ::3] = 1.0
    assert_close(kernel, (value, flat, locations, weights))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
@EVERY_HALF
def test_a_weight_that_is_not_finite_reaches_its_result_alone(kernel, bad, dtype):
    value, flat, locations, weights = make_inputs(batch=1, heads=3, dim=32, queries=30, dtype=dtype)
    expected = kernel.forward_products(value, flat, locations, weights)
    weights[0, 7, 1, 0, 1] = bad
    locations[0, 7, 1, 0, 1] = torch.tensor([0.4, 0.6])
    actual = kernel.forward_products(value, flat, locations, weights)
    own = torch.zeros(1, 30, 3, 32, dtype=torch.bool)
    own[0, 7, 1] = True
    own = own.view(expected.shape)
    # Beside it, the other head of the warp is added up in another way.
    torch.testing.assert_close(actual[~own], expected[~own], rtol=torch.finfo(dtype).eps, atol=2.0**-14)
    wanted = OP(value.float(), flat, locations, weights)[own].to(dtype)
    assert torch.equal(actual[own].isnan(), wanted.isnan())
    assert torch.equal(actual[own].isinf(), wanted.isinf())


def test_a_value_that_is_not_finite_reaches_the_items_of_its_warps_alone(kernel):
    value, flat, locations, weights = make_inputs(dim=32, heads=3, queries=20, dtype=torch.bfloat16)
    expected = kernel.forward_products(value, flat, locations, weights)
    value[0, ::7, 1, 9] = math.inf
    actual = kernel.forward_products(value, flat, locations, weights)
    wanted = OP(value.float(), flat, locations, weights)
    assert not wanted.isfinite().all()
    assert not actual[~wanted.isfinite()].isfinite().any()
    reached = ~wanted.isfinite().view(2, 60, 32)
    in_warps = torch.nn.functional.pad(reached, (0, 0, 0, 4)).view(2, 8, 8 * 32).any(2)
    others = ~in_warps[..., None].expand(2, 8, 8 * 32).reshape(2, 64, 32)[:, :60].reshape(actual.shape)
    assert others.any()
    assert torch.equal(actual[others], expected[others])


def test_more_images_than_a_grid_has_rows():
    change = {SAMPLES: [("kMaxGridY = 65535", "kMaxGridY = 2")]}
    small = emulate(binding=PRODUCTS_BINDING, defines=["BFLOAT16_ONLY"], changes=change)
    assert_close(small, make_inputs(batch=5, queries=13, dim=16, dtype=torch.bfloat16))


def run_sanitized(library, folder, dtypes=HALF):
    sizes = [{"dim": 32, "points": 5, "heads": 3}, {"dim": 24}, {"dim": 8, "batch": 1}, {"shapes": ((1, 1), (0, 3))}]
    sizes += [{"dim": 64, "batch": 1, "queries": 99, "shapes": ((3, 4), (1, 1))}]
    inputs = [make_inputs(dtype=dtype, **size) for dtype in dtypes for size in sizes]
    torch.save(inputs, folder / "inputs.pt")
    return run_with_address_sanitizer(emulated_ms_deform_attn.__file__, library, folder / "inputs.pt", "products")


def test_no_access_out_of_bounds(tmp_path):
    process = run_sanitized(build(PRODUCTS_BINDING, "addresses", changes=RUNS), tmp_path)
    assert process.returncode == 0, process.stderr


# --- Bugs planted in the kernel, each of which the tests must find ---


def broken_kernel(old, new, file=PRODUCTS):
    changes = {PRODUCTS: list(RUNS[PRODUCTS])}
    changes.setdefault(file, []).append((old, new))
    return emulate("races", PRODUCTS_BINDING, defines=["BFLOAT16_ONLY"], changes=changes)


WRONG_NUMBERS = {
    "what rounding leaves": ("upper.rest, lower.rest", "0, 0", PRODUCTS),
    "second part": ("add_product<T>(sums[k], values, {weights.z, weights.w});", "", PRODUCTS),
    "order of weights": ("upper.rounded, lower.rounded", "lower.rounded, upper.rounded", PRODUCTS),
    "corners": ("low_numbers(word[2][k], word[3][k])", "low_numbers(word[3][k], word[2][k])", PRODUCTS),
    "halves": ("return __byte_perm(first, second, 0x7632);", "return __byte_perm(first, second, 0x5410);", CORES),
    "columns of weights": ("group / 2 == column", "group % 4 == column", PRODUCTS),
    "items of lanes": ("((column ^ half) & 1)", "(column & 1)", PRODUCTS),
    "column of the result": ("lane.own_sums == 0 ? sums[k][0] : sums[k][1]", "sums[k][0]", PRODUCTS),
    "next item": ("same_item ? item : item + kItemsOfTurn", "item", PRODUCTS),
    "next samples": ("more ? first + kStagedSamples : 0", "0", PRODUCTS),
    "result": ("(items_before + own_item) * p.channels", "(items_before + item) * p.channels", PRODUCTS),
    "head": ("heads.divide(own_item) * p.heads", "heads.divide(item) * p.heads", PRODUCTS),
    "second sample": ("second = first + kItemsOfWarp", "second = first", PRODUCTS),
    "low": ("low = max(whole, 0);", "low = max(whole, 1);", PRODUCTS),
    "rim": ("high_weight = whole + 1 < size ? fraction : 0.f;", "high_weight = fraction;", PRODUCTS),
    "row": ("(map.start + rows.high * map.width)", "(map.start + rows.high * map.height)", PRODUCTS),
    "level": ("sample.exists ? points.divide(index) : 0", "sample.exists ? points.divide(index) / 2 : 0", PRODUCTS),
    "large weights": ("kLargest = 0x1p100f", "kLargest = 3.40282347e38f", CORES),
    "sums in floats": ("sums[k][3] += high * factor;", "", PRODUCTS),
}
DETECTING = {"dim": 32, "heads": 3, "queries": 60, "points": 4, "shapes": ((5, 9), (7, 8), (3, 2), (1, 2))}


def assert_no_bug_shows(kernel):
    inputs = make_inputs(**DETECTING, dtype=torch.bfloat16)
    value, flat, locations, weights = inputs
    assert_close(kernel, inputs, schedule=1)
    locations = locations.clone()
    locations[:, ::2] = locations[:, ::2] * 1.3 - 0.1  # more of them at the rim
    assert_close(kernel, (value, flat, locations, weights), schedule=1)
    assert_close(kernel, (value, flat, locations, weights * 2.0**101), schedule=1)
    pixel, of_one, centre, weight = make_inputs(dim=32, shapes=((1, 1),), points=1, dtype=torch.bfloat16)
    largest = torch.full_like(weight, 3.4e38)  # infinite in bfloat16
    assert_close(kernel, (pixel * 2.0**-4, of_one, torch.full_like(centre, 0.5), largest), schedule=1)
    ones = torch.ones_like(value)
    one_weight = torch.full_like(weights, 1 + 2.0**-9)  # which bfloat16 does not have
    assert_close(kernel, (ones, flat, locations * 0 + 0.5, one_weight / 16), schedule=1)


def test_the_kernel_has_none_of_the_bugs_below(in_runs):
    assert_no_bug_shows(in_runs)


@pytest.mark.slow
@pytest.mark.parametrize("bug", WRONG_NUMBERS)
def test_wrong_number_is_found(bug):
    with pytest.raises((AssertionError, KernelError), match=r"Tensor-likes are not close|race in global memory"):
        assert_no_bug_shows(broken_kernel(*WRONG_NUMBERS[bug]))


NO_BARRIER = {
    "before what is staged is read": ("__syncwarp();\n            const int32_t count", "const int32_t count"),
    "before what is staged is overwritten": ("            __syncwarp();\n          }\n", "          }\n"),
}  # fmt: skip


@pytest.mark.parametrize("place", NO_BARRIER)
def test_missing_barrier_is_found(place):
    broken = broken_kernel(*NO_BARRIER[place])
    with pytest.raises(KernelError, match="race in shared memory"):
        broken.forward_products(*make_inputs(**DETECTING, dtype=torch.bfloat16), schedule=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pass + channel < p.channels", "pass + channel <= p.channels"),
        ("own_item < end && pass", "own_item <= end && pass"),
        ("own < end && own_index", "own <= end && own_index"),
        ("high = min(whole + 1, size - 1);", "high = whole + 1;"),
        ("const int32_t end = min(items, ", "const int32_t end = max(items, "),
    ],
    ids=["channel", "item", "item of samples", "pixel", "items"],
)
def test_off_by_one_is_found(old, new, tmp_path):
    changes = {PRODUCTS: [*RUNS[PRODUCTS], (old, new)]}
    library = build(PRODUCTS_BINDING, "addresses", defines=["BFLOAT16_ONLY"], changes=changes)
    process = run_sanitized(library, tmp_path, dtypes=[torch.bfloat16])
    assert process.returncode != 0
    assert "ERROR: AddressSanitizer" in process.stderr
