"""The emulator computes what a GPU would, and reports kernels that are wrong."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import KernelError, Library, build, run_with_address_sanitizer

FOLDER = Path(__file__).parent
SCHEDULES = range(6)


@pytest.fixture(scope="module")
def library():
    return Library(build(FOLDER / "kernels.cpp"))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_calls(library, schedule):
    values = np.random.default_rng(0).integers(-99, 99, 64).astype(np.int32)
    output = np.zeros((17, 64), np.int32)
    library.call("run_warp_calls", pointer(values), pointer(output), schedule=schedule)
    threads, lanes = np.arange(64), np.arange(64) % 32
    warps = values.reshape(2, 32)

    def per_warp(function):
        return np.repeat([function(warp) for warp in warps], 32)

    def mask(flags):
        return np.uint32(sum(1 << int(lane) for lane in np.flatnonzero(flags))).astype(np.int32)

    remainders = np.fmod(warps, 3)
    halves = values.reshape(4, 16)
    expected = [
        values[threads - lanes + lanes // 2],
        values[threads // 8 * 8 + 1],
        values[np.where(lanes >= 3, threads - 3, threads)],
        values[np.where(lanes % 16 < 13, threads + 3, threads) % 64],
        values[threads ^ 5],
        per_warp(lambda warp: mask(warp > 0)),
        per_warp(lambda warp: (warp > 90).any()),
        per_warp(lambda warp: (warp > -90).all()),
        per_warp(np.sum),
        per_warp(np.min),
        per_warp(lambda warp: warp.view(np.uint32).max().astype(np.int32)),
        np.concatenate([[mask(warp == own) for own in warp] for warp in remainders]),
        np.full(64, (values > 0).sum()),
        np.full(64, (values > 98).any()),
        np.full(64, (values < 98).all()),
        values[threads ^ 1],
        np.concatenate([np.repeat([halves[i].sum(), halves[i + 1].max()], 16) for i in (0, 2)]),
    ]
    for own, wanted in zip(output, expected, strict=True):
        assert np.array_equal(own, wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics(library, schedule):
    values = np.random.default_rng(0).integers(-99, 99, 64).astype(np.float32)
    sums, wide, words = np.zeros(10, np.float32), np.zeros(1, np.uint64), np.zeros(5, np.int32)
    words[4] = -1
    library.call("run_atomics", *map(pointer, (values, sums, wide, words)), schedule=schedule)
    total = values.sum()
    assert sums[[0, 4, 5, 6, 7]].tolist() == [total, total, 64, 128, 192]
    assert sums[8:].view(np.float64) == total
    assert wide == 64 << 33
    assert words[:4].tolist() == [values.min(), values.max(), 5, 128]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_may_leave_early(library, schedule):
    output = np.zeros(66, np.int32)
    with pytest.raises(KernelError, match="race in global memory"):  # of the two blocks, which write the same
        library.call("run_leave_early", pointer(output), schedule=schedule)
    library.call("run_leave_early", pointer(output), schedule=schedule, ignore_races=True)
    expected = np.where(np.arange(64) % 4 == 3, 0, 12)
    expected[1::16] += 1
    assert np.array_equal(output[:64], expected)


def test_lost_update_needs_preemption_to_show(library):
    """In order each thread ends its `count += 1` before the next one begins: only a random schedule loses updates."""
    counts = []
    for schedule in SCHEDULES:
        count = np.zeros(1, np.int32)
        library.call("run_count", pointer(count), False, 1, schedule=schedule, ignore_races=True)
        counts.append(count.item())
        library.call("run_count", pointer(count), True, 1, schedule=schedule)
        assert count == 96
    assert counts[0] == 96
    assert max(counts[1:]) < 96


def test_lost_update_is_a_race_in_every_schedule(library):
    for schedule in SCHEDULES:
        with pytest.raises(KernelError, match=r"race in shared memory: a \w+ at kernels.cpp:\d+ and a \w+ of block"):
            library.call("run_count", pointer(np.zeros(1, np.int32)), False, 1, schedule=schedule)


def test_shared_memory_belongs_to_one_block(library):
    counts = np.zeros(5, np.int32)
    library.call("run_count", pointer(counts), True, 5, schedule=1)
    assert (counts == 96).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_missing_barrier(library, schedule):
    values, output = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    library.call("run_reverse", pointer(values), pointer(output), True, schedule=schedule)
    assert np.array_equal(output, values[::-1])
    with pytest.raises(KernelError, match="race in shared memory"):
        library.call("run_reverse", pointer(values), pointer(output), False, schedule=schedule)
    library.call("run_reverse", pointer(values), pointer(output), False, schedule=schedule, ignore_races=True)
    assert not np.array_equal(output, values[::-1])


def test_much_shared_memory_must_be_asked_for():
    library = Library(build(FOLDER / "kernels.cpp", "plain"))
    values = np.arange(64, dtype=np.int32)

    def reverse(kilobytes, allowed):
        output = np.zeros(64, np.int32)
        sizes = (ctypes.c_size_t(size << 10) for size in (kilobytes, allowed))
        library.call("run_reverse_with_shared_memory", pointer(values), pointer(output), *sizes)
        return output

    assert np.array_equal(reverse(48, 0), values[::-1])
    with pytest.raises(KernelError, match="launch configuration"):
        reverse(49, 0)
    with pytest.raises(KernelError):
        reverse(49, 228)
    assert np.array_equal(reverse(227, 227), values[::-1])
    with pytest.raises(KernelError, match="launch configuration"):
        reverse(101, 100)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, r"lanes disagree about the call: \w+ \(kernels.cpp:\d+\), others are in \w+ \(kernels.cpp:\d+\)"),
        (1, r"lanes disagree about the mask of __ballot_sync|the mask of __ballot_sync .* lacks the calling lane"),
        (2, "__shfl_sync reads lane 20, which does not take part"),
        (3, "the mask of __any_sync .* lacks the calling lane"),
        (4, "threads disagree about the barrier"),
        (5, r"deadlock; threads wait in __sync\w+ .* from thread \d+, __sync\w+ .* from thread"),
        (6, "access to local memory of thread 0"),
        (7, "race in global memory: a write .* and a write of block"),
        (8, "race in global memory: a read .* and a write of block|a write .* and a read"),
        (9, "race in global memory: an atomic .* and a read|a read .* and an atomic"),
    ],
)
def test_misuse_is_reported(library, which, message, schedule):
    with pytest.raises(KernelError, match=message):
        library.call("run_misuse", which, pointer(np.zeros(256, np.int32)), schedule=schedule)


def test_invalid_launch(library):
    with pytest.raises(KernelError, match="launch configuration"):
        library.call("run_too_many_threads", pointer(np.zeros(1, np.int32)))


@pytest.mark.parametrize(
    ("which", "where"), [(1, "heap-buffer-overflow"), (2, "use-after-poison"), (3, "global-buffer-overflow")]
)
def test_out_of_bounds(which, where):
    library = build(FOLDER / "kernels.cpp", "addresses")
    process = run_with_address_sanitizer(FOLDER / "out_of_bounds.py", library, which)
    assert process.returncode != 0
    assert where in process.stderr
    assert run_with_address_sanitizer(FOLDER / "out_of_bounds.py", library, 0).returncode == 0


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_low_precision(library, name, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    values = torch.cat((every, torch.randn(4000), torch.randn(1000) * 1e-7, every[:-1].lerp(every[1:], 0.5)))
    output = torch.empty_like(values)
    library.call(f"run_{name}", *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, output)), len(values))
    assert torch.equal(output.nan_to_num(7), values.to(dtype).float().nan_to_num(7))
    assert torch.equal(output.isnan(), values.isnan())


# --- Tensor cores: csrc/cuda/tensor_cores.cuh ---


@pytest.fixture(scope="module")
def products():
    return Library(build(FOLDER / "products.cpp"))


def fragment_places(kind):
    """``[lane, number]``: rows and columns of the numbers of each lane, by the formulas of the PTX ISA.

    They are those of "Matrix Fragments for mma.m16n8k16 with floating point type", in terms of groupID and
    threadID_in_group, for the numbers i of a lane in ascending order.
    """
    numbers = {"a": 8, "b": 4, "c": 4}[kind]
    lane, i = np.arange(32)[:, None], np.arange(numbers)[None, :]
    group, thread = lane // 4, lane % 4
    if kind == "a":
        lies_above = (i < 2) | ((i >= 4) & (i < 6))
        return np.where(lies_above, group, group + 8), thread * 2 + (i & 1) + np.where(i >= 4, 8, 0)
    if kind == "b":
        return thread * 2 + (i & 1) + np.where(i >= 2, 8, 0), np.broadcast_to(group, (32, numbers))
    return np.where(i < 2, group, group + 8), thread * 2 + (i & 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_product_of_matrices(products, dtype, schedule):
    generator = torch.Generator().manual_seed(schedule)
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((16, 16), (16, 8)))
    sums = torch.randn(16, 8, generator=generator)
    own_a, own_b, own = (
        matrix[places].contiguous()
        for matrix, places in ((a, fragment_places("a")), (b, fragment_places("b")), (sums, fragment_places("c")))
    )
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (own_a, own_b, own))
    products.call(f"run_product_{dtype}".replace("torch.", ""), *pointers, schedule=schedule)
    expected = sums.double() + a.double() @ b.double()
    torch.testing.assert_close(own.double(), expected[fragment_places("c")], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_transposed_matrix(products, schedule):
    matrix = np.random.default_rng(schedule).integers(0, 2**16, (8, 8)).astype(np.uint16)
    words = matrix.reshape(32, 2).copy()  # lane 4 * row + t has columns 2 * t and the next
    products.call("run_transpose", pointer(words), schedule=schedule)
    assert np.array_equal(words.reshape(8, 8), matrix.T)
    with pytest.raises(KernelError, match="movmatrix without all lanes of the warp"):
        products.call("run_transpose_in_some_lanes", pointer(words), schedule=schedule)
