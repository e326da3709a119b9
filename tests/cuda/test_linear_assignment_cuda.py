"""The CUDA kernels of linear_assignment, run on the CPU (see tests/cuda_on_cpu).

They follow the algorithm of the CPU kernel step by step, so that the results are equal index by index.
"""

import emulated_linear_assignment
import numpy as np
import pytest
import torch
from cuda_on_cpu.build import KernelError, build, run_with_address_sanitizer
from emulated_linear_assignment import BINDING, crowd, emulate
from scipy.optimize import linear_sum_assignment

from groupdetr_fast import ops

KERNEL = "cuda/linear_assignment.cuh"
SCHEDULES = range(4)


@pytest.fixture(scope="module")
def solve():
    return emulate()


@pytest.fixture(scope="module")
def fast_solve():
    return emulate("plain")


def normal(random, *shape):
    return random.standard_normal(shape)


def ties(random, *shape):
    return random.integers(0, 4, shape)


def constant(random, *shape):
    return np.full(shape, -2.5)


def unusable(random, *shape):
    cost = random.standard_normal(shape)
    cost[random.random(shape) < 0.3] = random.choice([np.nan, np.inf, -np.inf, 3e38])
    cost[0] = np.nan
    return cost


def problems(make, shape, dtype=np.float32):
    random = np.random.default_rng(sum(shape))
    with np.errstate(over="ignore"):
        cost = make(random, *shape).astype(dtype)
    num_targets = random.integers(0, shape[-2] + 1, shape[:-2])
    num_targets.flat[0] = shape[-2]
    return cost, num_targets


def expected(cost, num_targets):
    return ops.linear_assignment(torch.tensor(cost), torch.tensor(num_targets)).numpy()


def assert_optimal(cost, size, assigned):
    rows = np.flatnonzero(assigned >= 0)
    assert len(rows) == len(set(assigned[rows])) == min(size, cost.shape[1])
    assert (rows < size).all()
    cost = cost[:size].astype(np.float64)
    best = cost[linear_sum_assignment(cost)].sum()
    assert cost[rows, assigned[rows]].sum() == pytest.approx(best, 1e-12, 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [normal, ties, constant, crowd, unusable])
@pytest.mark.parametrize(
    ("targets", "queries"),
    [(1, 1), (1, 9), (2, 2), (5, 300), (20, 67), (33, 64), (32, 32), (9, 1), (40, 23), (34, 1030)],
    ids=str,
)
def test_matches_the_cpu_kernel_for_every_schedule(solve, targets, queries, make, dtype):
    cost, num_targets = problems(make, (2, targets, queries), dtype)
    wanted = expected(cost, num_targets)
    for problem, size, assigned in zip(cost, num_targets, wanted, strict=True):
        if make is not unusable:
            assert_optimal(problem, size, assigned)
    # Blocks of 512 threads take long, and they differ from those of 128 in their number of warps only.
    for schedule in SCHEDULES if queries < 1000 else (1,):
        assert np.array_equal(solve(cost, num_targets, schedule=schedule), wanted)


@pytest.mark.parametrize(("targets", "queries"), [(100, 300), (150, 70), (70, 1500)], ids=str)
def test_large_problems(fast_solve, targets, queries):
    cost, num_targets = problems(normal, (1, targets, queries))
    result = fast_solve(cost, num_targets, schedule=1)
    assert_optimal(cost[0], targets, result[0])
    assert np.array_equal(result, expected(cost, num_targets))


def test_workspace_in_global_memory(solve, fast_solve):
    random = np.random.default_rng(0)
    cost = random.random((1, 1000, 1000), dtype=np.float32) + 1
    cost[0, np.arange(1000), random.permutation(1000)] = 0
    cost[0, 500:510] = cost[0, 0]  # a few rows that need a search
    num_targets = np.array([1000])
    assert np.array_equal(fast_solve(cost, num_targets), expected(cost, num_targets))

    small = emulate(defines=["FLOAT32_ONLY"], changes={KERNEL: [("kSharedBytes = 46 << 10", "kSharedBytes = 0")]})
    cost, num_targets = problems(crowd, (2, 20, 1030))
    assert np.array_equal(small(cost, num_targets, schedule=1), expected(cost, num_targets))


def test_strides_and_clamping(solve):
    cost, _ = problems(normal, (2, 3, 7, 4 * 11))
    cost = np.moveaxis(cost.reshape(2, 3, 7, 4, 11), -2, -3)  # [2, 3, 4, 7, 11]
    num_targets = np.broadcast_to(np.array([7, -2, 99])[:, None], (2, 3, 4))
    assert np.array_equal(solve(cost, num_targets), expected(cost, num_targets))
    cost = np.broadcast_to(cost[:1, :, :1], (2, 3, 4, 7, 11))
    assert np.array_equal(solve(cost, num_targets), expected(cost, num_targets))
    one, size = cost[0, 0, 0], np.array(7)
    assert np.array_equal(solve(one, size), expected(one, size))


def test_no_queries(solve):
    assert (solve(np.zeros((2, 3, 0), np.float32), np.array([3, 1])) == -1).all()


def test_padding_is_not_read(solve):
    cost, _ = problems(normal, (1, 10, 12))
    padded = cost.copy()
    padded[:, 7:] = np.nan
    assert np.array_equal(solve(padded, np.array([7])), solve(cost, np.array([7])))


def test_no_access_out_of_bounds():
    process = run_with_address_sanitizer(emulated_linear_assignment.__file__, build(BINDING, "addresses"))
    assert process.returncode == 0, process.stderr


# --- Bugs planted in the kernel, each of which the tests must find ---


def change(old, new):
    return {"defines": ["FLOAT32_ONLY"], "changes": {KERNEL: [(old, new)]}}


NO_BARRIER = {
    "in the minimum of a block": ("      __syncthreads();\n      own = {", "      own = {"),
    "between the uses of a buffer": ("      turn_ ^= 1;\n", ""),
    "between chunks of rows": ("__popc(winners);\n      __syncwarp();\n", "__popc(winners);\n"),
    "after the row minima": (
        "if (team_.any(!find_row_minima())) find_sentinel();\n    team_.sync();\n",
        "find_row_minima();\n",
    ),
    "after a path": ("    ++num_slots_;\n    team_.sync();\n", "    ++num_slots_;\n"),
}
PLAIN_UPDATE = ("atomicOr(&w_.taken[column / 32], ", "w_.taken[column / 32] |= (")


@pytest.mark.parametrize("place", NO_BARRIER)
def test_missing_barrier_is_found(place):
    broken = emulate(**change(*NO_BARRIER[place]))
    with pytest.raises(KernelError, match="race in shared memory"):
        broken(*problems(ties, (1, 40, 45)), schedule=1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (*PLAIN_UPDATE, "race in shared memory"),
        ("if (team_.rank() == 0) {\n      w_.taken", "{\n      w_.taken", "race in shared memory"),
        ("(team_.warp() == 0) match_free", "(team_.rank() < 16) match_free", "deadlock"),
        ("= __ballot_sync(kAllLanes, wins)", "= exists ? __ballot_sync(kAllLanes, wins) : 0", "lanes disagree"),
    ],
    ids=["plain update", "every thread matches the path", "half a warp", "warp-wide call in a branch"],
)
def test_planted_bug_is_reported(old, new, message):
    broken = emulate(**change(old, new))
    with pytest.raises(KernelError, match=message):
        broken(*problems(ties, (1, 40, 45)), schedule=1)


def test_lost_update_needs_preemption_to_show():
    broken = emulate(**change(*PLAIN_UPDATE))
    cost, num_targets = problems(normal, (4, 20, 40))
    wanted = expected(cost, num_targets)
    results = [broken(cost, num_targets, schedule=schedule, ignore_races=True) for schedule in range(8)]
    assert np.array_equal(results[0], wanted)  # one thread after the other loses nothing
    assert not all(np.array_equal(result, wanted) for result in results[1:])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("column = first; column < costs_.columns;", "column = first; column <= costs_.columns;"),
        ("min(first_row + r, costs_.rows - 1)", "min(first_row + r, costs_.rows)"),
        ("target = team.rank(); target < batch.targets;", "target = team.rank(); target <= batch.targets;"),
        ("team_.lane() == 0 && first + r < costs_.rows", "team_.lane() == 0"),
    ],
    ids=["column", "row", "target", "last rows"],
)
def test_off_by_one_is_found(old, new):
    library = build(BINDING, "addresses", **change(old, new))
    process = run_with_address_sanitizer(emulated_linear_assignment.__file__, library, "float32 only")
    assert process.returncode != 0
    assert "AddressSanitizer" in process.stderr


# --- On a GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph():
    cost = torch.randn(6, 2, 20, 300, device="cuda")
    num_targets = torch.full((6, 2), 20, device="cuda")
    ops.linear_assignment(cost, num_targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.linear_assignment(cost, num_targets)
    cost.copy_(torch.randn(6, 2, 20, 300))
    num_targets[1] = 3
    graph.replay()
    assert torch.equal(result.cpu(), ops.linear_assignment(cost.cpu(), num_targets.cpu()))
