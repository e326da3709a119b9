"""Sorting the samples of ms_deform_attn in shared memory, run on the CPU (see tests/cuda_on_cpu)."""

import itertools
import math

import emulated_ms_deform_attn
import pytest
import torch
from cuda_on_cpu.build import KernelError, build, run_with_address_sanitizer
from deformable_cases import EMPTY, grad_of_result, missing_samples
from emulated_ms_deform_attn import BINDING, CELLS_OF_TILE, TILES_BINDING, emulate

from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

CHUNKS = "cuda/ms_deform_attn_chunks.cuh"
SAMPLES = "cuda/ms_deform_attn_samples.cuh"
OP_BACKWARD = torch.ops.groupdetr_fast.ms_deform_attn_backward

# Maps of the tests have few bins and samples: with these constants they have several windows and chunks all the same,
# and the threads of a block take several turns.
SMALL = [("kLeastSamples = 4096, kMostSamples = 16384", "kLeastSamples = 40, kMostSamples = 80")]
SMALL += [("kWindowBins = 12 << 10", "kWindowBins = 60"), ("kChunkThreads = 512", "kChunkThreads = 4")]
CASES = {
    "plain": {},
    "one_of_everything": {"batch": 1, "queries": 1, "heads": 1, "dim": 1, "shapes": ((1, 1),), "points": 1},
    "several_chunks": {"queries": 89, "heads": 3, "shapes": ((5, 7), (3, 4), (2, 2), (1, 1)), "points": 4},
    "a_query_is_a_chunk": {"batch": 1, "queries": 9, "heads": 1, "shapes": ((1, 2), (1, 1)), "points": 60},
    "many_windows": {"batch": 1, "queries": 40, "heads": 1, "shapes": ((9, 40), (13, 5), (1, 1)), "points": 1},
    "one_bin_has_most": {"batch": 1, "queries": 150, "heads": 1, "shapes": ((1, 2), (2, 7)), "points": 4},
    "empty_levels": {"queries": 30, "shapes": ((0, 3), (4, 6), (2, 0), (3, 2), (0, 0))},
    "sixteen_levels": {"shapes": ((2, 3),) * 16, "points": 1, "queries": 11},
    "long_batch": {"batch": 35, "queries": 3, "heads": 1, "dim": 4},
}


@pytest.fixture(scope="module")
def as_it_is():
    return emulate()


@pytest.fixture(scope="module")
def small():
    return emulate(defines=["FLOAT32_ONLY"], changes={CHUNKS: SMALL})


def sort(kernel, inputs, shared_sort, **options):
    """Gradients that tell how samples were sorted: the order of additions is that of the sorted samples."""
    grad = grad_of_result(inputs[0], inputs[2])
    return kernel.backward(grad, *inputs, way="in_order", shared_sort=shared_sort, **options)


def assert_same_order(kernel, inputs, **options):
    for actual, wanted in zip(sort(kernel, inputs, True, **options), sort(kernel, inputs, False), strict=True):
        assert torch.equal(actual, wanted)


def assert_sums(kernel, inputs, **options):
    """The gradients where sums are added up in any order, among them those of samples that touch no pixel."""
    grad = grad_of_result(inputs[0], inputs[2])
    grads = kernel.backward(grad, *inputs, way="sorted", shared_sort=True, **options)
    for actual, wanted in zip(grads, OP_BACKWARD(grad, *inputs), strict=True):
        scale = wanted.abs().max().item() if wanted.numel() else 0
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2.0**-20 * scale)


def assert_sorts(kernel, inputs, **options):
    assert_same_order(kernel, inputs, **options)
    assert_sums(kernel, inputs, **options)


@pytest.mark.parametrize("case", CASES)
def test_sorts_as_without_shared_memory(as_it_is, small, case):
    inputs = make_inputs(**CASES[case])
    for kernel in (as_it_is, small):
        assert_sorts(kernel, inputs, schedule=1)


@pytest.mark.parametrize("case", ["plain", "several_chunks"])
def test_sorts_numbers_of_double_precision(as_it_is, case):
    assert_sorts(as_it_is, make_inputs(**CASES[case], dtype=torch.float64), schedule=1)


@pytest.mark.parametrize("schedule", range(4))
def test_every_schedule(small, schedule):
    inputs = make_inputs(**CASES["several_chunks"])
    assert_sorts(small, inputs, schedule=schedule)


@pytest.mark.parametrize("case", EMPTY)
def test_empty_sizes(small, case):
    inputs = make_inputs(**EMPTY[case])
    grad = grad_of_result(inputs[0], inputs[2])
    for way in ("sorted", "in_order"):
        assert all((tensor == 0).all() for tensor in small.backward(grad, *inputs, way=way, shared_sort=True))


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e30, 25.0])
def test_samples_that_touch_no_pixel(small, bad):
    inputs, _ = missing_samples(bad, torch.float32)
    grad = grad_of_result(inputs[0], inputs[2])
    _, grad_locations, grad_weights = small.backward(grad, *inputs, way="sorted", shared_sort=True)
    assert (grad_locations[..., :2, :] == 0).all()
    assert (grad_weights[..., :2] == 0).all()
    assert (grad_weights[..., 2:] != 0).any()


def test_tiles_of_samples_that_are_sorted_so():
    kernel = emulate(binding=TILES_BINDING, defines=["BFLOAT16_ONLY"], changes={CHUNKS: SMALL})
    for case in ("plain", "several_chunks", "many_windows", "one_bin_has_most", "empty_levels"):
        inputs = make_inputs(**CASES[case], dtype=torch.bfloat16)
        grad = grad_of_result(inputs[0], inputs[2])
        grads = kernel.backward_tiles(grad, *inputs, shared_sort=True, schedule=1)
        for actual, wanted in zip(grads, kernel.backward_tiles(grad, *inputs), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=2.0**-20 * wanted.abs().max().item())


def test_more_maps_than_a_grid_has_rows():
    changes = {CHUNKS: SMALL, SAMPLES: [("kMaxGridY = 65535", "kMaxGridY = 2")]}
    kernel = emulate(defines=["FLOAT32_ONLY"], changes=changes)
    inputs = make_inputs(batch=3, queries=40, dim=4)
    assert_sorts(kernel, inputs, schedule=1)


ENCODER = ((100, 167), (50, 84), (25, 42), (13, 21))


@pytest.mark.parametrize("cells", [1, CELLS_OF_TILE])
@pytest.mark.parametrize(
    ("shapes", "queries"),
    [(ENCODER, 22223), (ENCODER, 9900), (ENCODER, 300), (((800, 1333),), 300), (((800, 1333),), 10**6), (((1, 1),), 9)],
)
def test_offsets_take_a_number_for_a_sample_and_one_for_a_bin_at_most(as_it_is, cells, shapes, queries):
    flat = list(itertools.chain(*shapes))
    weights = torch.empty(1, device="cpu").expand(2, queries, 8, len(shapes), 4)
    value = torch.empty(1).expand(2, sum(h * w for h, w in shapes), 8, 32)
    kernel = as_it_is if cells == 1 else emulate(binding=TILES_BINDING)
    maps, samples = 16, queries * len(shapes) * 4
    bins = sum((h + 1) * (w // cells + 1) for h, w in shapes)
    assert maps * bins <= kernel.offsets_size(value, flat, weights) <= maps * (samples + bins)


def run_sanitized(library, folder):
    """Run a library over problems of several sizes under AddressSanitizer; return the finished process."""
    torch.save([make_inputs(**CASES[case]) for case in ("several_chunks", "many_windows")], folder / "inputs.pt")
    return run_with_address_sanitizer(emulated_ms_deform_attn.__file__, library, folder / "inputs.pt")


def test_no_access_out_of_bounds(tmp_path):
    process = run_sanitized(build(BINDING, "addresses", ["FLOAT32_ONLY"], {CHUNKS: SMALL}), tmp_path)
    assert process.returncode == 0, process.stderr


# --- Bugs planted in the kernels, each of which the tests must find ---


def broken(*changes):
    return {"defines": ["FLOAT32_ONLY"], "changes": {CHUNKS: [*SMALL, *changes]}}


END_OF_MAP = "    __syncthreads();\n  }\n}\n\n"
NO_BARRIER = {
    "before samples are counted": (
        "counts_of_chunk[bin] = 0;\n    __syncthreads();",
        "counts_of_chunk[bin] = 0;",
    ),
    "before counts are read": (
        "        });\n    __syncthreads();\n    int32_t* const of_map",
        "        });\n    int32_t* const of_map",
    ),
    "before places are taken": (
        "__ldg(offsets_of_chunk + bin);\n    }\n    __syncthreads();",
        "__ldg(offsets_of_chunk + bin);\n    }",
    ),
    "before places are overwritten": (
        END_OF_MAP + "template <typename Kernel",
        "  }\n}\n\ntemplate <typename Kernel",
    ),
}


# Places that are read before they are written may be any number.
TAKEN = "atomicAdd(&next_of_bin[bin], 1)"
IN_BOUNDS = (TAKEN, f"static_cast<uint32_t>({TAKEN}) % (p.queries * p.levels * p.points)")


@pytest.mark.slow
@pytest.mark.parametrize("place", NO_BARRIER)
def test_missing_barrier_is_found(place):
    changes = broken(NO_BARRIER[place], IN_BOUNDS)
    changes["changes"][SAMPLES] = [("kMaxGridY = 65535", "kMaxGridY = 1")]
    kernel = emulate(**changes)
    with pytest.raises(KernelError, match="race in shared memory"):
        sort(kernel, make_inputs(**CASES["several_chunks"]), True, schedule=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "memory"),
    [
        ("atomicAdd(&counts_of_chunk[bin], 1);", "++counts_of_chunk[bin];", "shared"),
        (TAKEN, "next_of_bin[bin]++", "shared"),
        ("before[k] = atomicAdd(&of_map[bin], count);", "before[k] = of_map[bin], of_map[bin] += count;", "global"),
    ],
    ids=["count", "place", "offset"],
)
def test_plain_update_is_found(old, new, memory):
    kernel = emulate(**broken((old, new)))
    with pytest.raises(KernelError, match=f"race in {memory} memory"):
        sort(kernel, make_inputs(**CASES["several_chunks"]), True, schedule=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min(chunks.queries, p.queries - first_query)", "min(chunks.queries - 1, p.queries - first_query)"),
        ("(own.first_query + query) * samples + index", "query * samples + index"),
        ("+ map % p.heads) * (p.levels", "+ map / p.heads) * (p.levels"),
        (" && own.first_bin == 0 && grad", " && own.first_bin < 0 && grad"),
        ("(bin_of_window) < static_cast<uint32_t>(bins)", "(bin_of_window) < static_cast<uint32_t>(bins - 1)"),
        ("column / kCells", "column / kCells + 1"),
        ("(p, bins, index / p.points)", "(p, bins, index / p.points / 2)"),
        ("index < samples; index += lanes", "index < lanes; index += lanes"),
        ("query += at_once * kAtOnce)", "query += own.queries)"),
    ],
    ids=["query", "index", "head", "zeros", "window", "bin", "level", "turn of samples", "turn of queries"],
)
def test_wrong_number_is_found(old, new):
    kernel = emulate(**broken((old, new)))
    inputs = make_inputs(**CASES["several_chunks"])
    with pytest.raises(AssertionError, match="not close"):
        assert_sums(kernel, inputs, ignore_races=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min(chunks.queries, p.queries - first_query)", "chunks.queries"),
        ("+ __ldg(offsets_of_chunk + bin)", ""),
        ("bin < own.bins; bin += kChunkThreads) {", "bin < own.bins; bin += own.bins) {"),
        ("bin < own.bins; bin += kChunkThreads) counts", "bin < own.bins; bin += own.bins) counts"),
        ("first < own.bins; first += kChunkThreads * kBinsAtOnce", "first < own.bins; first += own.bins"),
        ("chunks.window_bins * sizeof(int32_t)", "(chunks.window_bins - 1) * sizeof(int32_t)"),
        ("static_cast<int32_t>(min(int64_t{chunks.window_bins}, of_map.count - first_bin))", "chunks.window_bins"),
    ],
    ids=["query", "offset", "turn of places", "turn of zeros", "turn of counts", "shared memory", "last window"],
)
def test_access_out_of_bounds_is_found(old, new, tmp_path):
    process = run_sanitized(build(BINDING, "addresses", **broken((old, new))), tmp_path)
    assert process.returncode != 0
    assert "ERROR: AddressSanitizer" in process.stderr
