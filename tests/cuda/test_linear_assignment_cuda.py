"""The CUDA kernels of linear_assignment, run on the CPU (see tests/cuda_on_cpu).

They follow the algorithm of the CPU kernel step by step, so that the results are equal index by index, whichever way
they go: with costs copied to shared memory or without, summed in doubles or in fixed point.
"""

import emulated_linear_assignment
import numpy as np
import pytest
import torch
from cuda_on_cpu.build import KernelError, build, run_with_address_sanitizer
from emulated_linear_assignment import BINDING, H200, RTX_4090, T4, crowd, emulate
from scipy.optimize import linear_sum_assignment

from groupdetr_fast import ops
from groupdetr_fast.testing import assignment_way

KERNEL = "cuda/linear_assignment.cuh"
SOLVER = "cuda/linear_assignment_solver.cuh"
TEAM = "cuda/linear_assignment_team.cuh"
ARITHMETIC = "linear_assignment.h"
SCHEDULES = range(4)
SHARED, FIXED = {"shared_costs": True}, {"fixed_point": True}
FIXED_POINT_SPREAD = 26  # FixedPoint::kSpread of csrc/linear_assignment.h
WAYS = {"shared costs": SHARED, "fixed point": FIXED, "both": SHARED | FIXED}


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


def exponents(random, *shape):
    """As far apart as fixed point takes, both zeros among them."""
    cost = np.ldexp(1 + random.random(shape), random.integers(0, FIXED_POINT_SPREAD + 1, shape))
    cost *= random.choice([-1, 0, 1], shape)
    cost.flat[:2] = 1, -(2.0**FIXED_POINT_SPREAD)
    return cost


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [normal, ties, crowd, exponents, unusable])
@pytest.mark.parametrize(("targets", "queries"), [(1, 1), (5, 300), (33, 64), (32, 32), (40, 23)], ids=str)
def test_every_way_matches_the_cpu_kernel_for_every_schedule(solve, targets, queries, make, way):
    cost, num_targets = problems(make, (2, targets, queries))
    wanted = expected(cost, num_targets)
    for schedule in SCHEDULES:
        assert np.array_equal(solve(cost, num_targets, schedule=schedule, **WAYS[way]), wanted)


@pytest.mark.parametrize("make", [normal, unusable])
def test_shared_costs_of_float64(solve, make):
    cost, num_targets = problems(make, (2, 20, 40), np.float64)
    for way in WAYS.values():
        assert np.array_equal(solve(cost, num_targets, schedule=1, **way), expected(cost, num_targets))


@pytest.mark.parametrize(("targets", "queries"), [(100, 300), (150, 70), (70, 1500)], ids=str)
def test_large_problems(fast_solve, targets, queries):
    cost, num_targets = problems(normal, (1, targets, queries))
    wanted = expected(cost, num_targets)
    assert_optimal(cost[0], targets, wanted[0])
    for way in ({}, *WAYS.values()):
        assert np.array_equal(fast_solve(cost, num_targets, schedule=1, **way), wanted)


def test_several_warps_search_shared_costs(solve):
    """Those of problems of more targets than it takes long to emulate with checks."""
    assert solve.plan(1, 140, 150).search_threads == 128
    for_few = {KERNEL: [("kRowsOfWarp = 128", "kRowsOfWarp = 8")]}
    wide = emulate(defines=["FLOAT32_ONLY"], changes=for_few)
    assert wide.plan(1, 20, 40).search_threads == 128
    for make in (crowd, unusable):
        cost, num_targets = problems(make, (2, 20, 40))
        for schedule in SCHEDULES:
            for way in (SHARED, SHARED | FIXED):
                assert np.array_equal(wide(cost, num_targets, schedule=schedule, **way), expected(cost, num_targets))


# --- Sums in fixed point ---


@pytest.fixture(scope="module")
def without_fixed_sums():
    """Where it adds up in fixed point, every cost is 0, and most assignments of crowds are wrong."""
    changes = {ARITHMETIC: [("-mantissa : mantissa) * factor", "-mantissa : mantissa) * 0")]}
    return emulate("plain", defines=["FLOAT32_ONLY"], changes=changes)


@pytest.mark.parametrize(
    ("smallest", "is_exact"),
    [
        (2.0**-FIXED_POINT_SPREAD, True),
        (2.0 ** -(FIXED_POINT_SPREAD + 1), False),
        (-0.0, True),
        (-(2.0 ** -(FIXED_POINT_SPREAD + 1)), False),
        (1e-40, False),  # no normal number
        (np.nan, False),
    ],
    ids=str,
)
def test_fixed_point_is_taken_where_it_is_exact(solve, without_fixed_sums, smallest, is_exact):
    cost, num_targets = problems(crowd, (1, 20, 40))
    cost = 1 + cost / cost.max() * 0.9  # of one exponent
    cost[0, 7, 30] = smallest
    wanted = expected(cost, num_targets)
    assert np.array_equal(solve(cost, num_targets, schedule=1, **FIXED), wanted)
    assert np.array_equal(without_fixed_sums(cost, num_targets, **FIXED), wanted) != is_exact
    assert np.array_equal(without_fixed_sums(cost, num_targets), wanted)


def test_costs_without_a_large_exponent(solve):
    for scale in (2.0**-126, 2.0**-120, 2.0**-149, 2.0**70):
        cost, num_targets = problems(crowd, (1, 20, 40))
        cost = (cost * scale).astype(np.float32)
        assert np.array_equal(solve(cost, num_targets, schedule=1, **FIXED), expected(cost, num_targets))
    zeros = np.zeros((1, 20, 40), np.float32)
    assert np.array_equal(solve(zeros, num_targets, schedule=1, **FIXED), expected(zeros, num_targets))


def test_missing_guard_of_fixed_point_is_found(fast_solve):
    cost, num_targets = problems(crowd, (1, 20, 40))
    cost[0, 3, 4] = 2.0**40
    wanted = expected(cost, num_targets)
    assert np.array_equal(fast_solve(cost, num_targets, **FIXED), wanted)
    guard = "return smallest_less_one >= (static_cast<uint32_t>(exponent_) << kMantissaBits) - 1;"
    broken = emulate("plain", defines=["FLOAT32_ONLY"], changes={ARITHMETIC: [(guard, "return true;")]})
    assert not np.array_equal(broken(cost, num_targets, **FIXED), wanted)


# --- Which way is taken ---


def test_costs_go_to_shared_memory_where_all_problems_run_at_the_same_time(solve):
    assert not solve.plan(132, 100, 300, shared_costs=False).shared_costs
    plan = solve.plan(132, 100, 300)  # 117 KiB of costs: one block a multiprocessor
    assert (plan.shared_costs, plan.threads, plan.search_threads) == (True, 128, 32)
    assert plan.dynamic_bytes == plan.workspace_bytes + 4 * 100 * 300
    assert not solve.plan(133, 100, 300).shared_costs
    assert not solve.plan(132, 100, 300, RTX_4090).shared_costs  # a block gets 99 KiB there
    assert solve.plan(1056, 20, 300).shared_costs  # 8 of 23 KiB a multiprocessor
    assert not solve.plan(1056 + 132, 20, 300).shared_costs
    assert solve.plan(128 * 3, 20, 300, RTX_4090).shared_costs
    assert not solve.plan(128 * 3 + 1, 20, 300, RTX_4090).shared_costs
    assert solve.plan(132 * 8, 3, 100).shared_costs  # registers are what limits it, and threads below
    assert not solve.plan(132 * 8 + 1, 3, 100).shared_costs
    assert solve.plan(40 * 8, 3, 100, T4).shared_costs
    assert not solve.plan(40 * 8 + 1, 3, 100, T4).shared_costs
    assert not solve.plan(1, 100, 300, dtype="float64").shared_costs


def test_memory_for_shared_costs_is_asked_for_once_for_every_size(fast_solve):
    """A limit of one problem's bytes would be too low for a larger one that another thread launches."""
    random = np.random.default_rng(0)
    for shape in ((2, 3, 5), (2, 50, 300), (2, 3, 5)):  # 60 KB of costs, more than a block gets without asking
        cost, num_targets = random.random(shape, dtype=np.float32), np.full(shape[0], shape[1])
        for fixed in (False, True):
            found = fast_solve(cost, num_targets, shared_costs=True, fixed_point=fixed)
            assert np.array_equal(found, expected(cost, num_targets))


def test_plans_without_shared_costs_are_those_of_every_gpu(solve):
    for shape, threads, in_shared_memory in [
        ((32, 1024), 32, True),
        ((33, 1024), 128, True),
        ((512, 900), 128, True),
        ((20, 1025), 512, True),
        ((900, 900), 512, False),
    ]:
        for device in (H200, RTX_4090, T4):
            plan = solve.plan(5000, *shape, device)
            assert (plan.threads, plan.search_threads) == (threads, threads)
            assert plan.in_shared_memory == in_shared_memory
            assert plan.dynamic_bytes == (plan.workspace_bytes if in_shared_memory else 0) <= 48 << 10


def test_fixed_point_is_for_float32_and_slow_doubles(solve):
    assert solve.plan(132, 100, 300, slow_doubles=True).fixed_point
    assert not solve.plan(132, 100, 300, slow_doubles=False).fixed_point
    assert not solve.plan(132, 100, 300, dtype="float64", slow_doubles=True).fixed_point


def test_workspace_in_global_memory(solve, fast_solve):
    random = np.random.default_rng(0)
    cost = random.random((1, 1000, 1000), dtype=np.float32) + 1
    cost[0, np.arange(1000), random.permutation(1000)] = 0
    cost[0, 500:510] = cost[0, 0]  # a few rows that need a search
    num_targets = np.array([1000])
    assert np.array_equal(fast_solve(cost, num_targets), expected(cost, num_targets))
    assert np.array_equal(fast_solve(cost, num_targets, **FIXED), expected(cost, num_targets))

    small = emulate(defines=["FLOAT32_ONLY"], changes={KERNEL: [("kSharedBytes = 46 << 10", "kSharedBytes = 0")]})
    cost, num_targets = problems(crowd, (2, 20, 1030))
    for way in ({}, FIXED):
        assert np.array_equal(small(cost, num_targets, schedule=1, **way), expected(cost, num_targets))


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["default", *WAYS])
def test_strides_and_clamping(solve, way):
    cost, _ = problems(normal, (2, 3, 7, 4 * 11))
    cost = np.moveaxis(cost.reshape(2, 3, 7, 4, 11), -2, -3)  # [2, 3, 4, 7, 11]
    num_targets = np.broadcast_to(np.array([7, -2, 99])[:, None], (2, 3, 4))
    assert np.array_equal(solve(cost, num_targets, **way), expected(cost, num_targets))
    cost = np.broadcast_to(cost[:1, :, :1], (2, 3, 4, 7, 11))
    assert np.array_equal(solve(cost, num_targets, **way), expected(cost, num_targets))
    one, size = cost[0, 0, 0], np.array(7)
    assert np.array_equal(solve(one, size, **way), expected(one, size))


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["default", *WAYS])
def test_no_queries_or_no_targets(solve, way):
    assert (solve(np.zeros((2, 3, 0), np.float32), np.array([3, 1]), **way) == -1).all()
    assert (solve(np.zeros((2, 3, 4), np.float32), np.array([0, -1]), **way) == -1).all()


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["default", *WAYS])
def test_padding_is_not_read(solve, way):
    cost, _ = problems(normal, (1, 10, 12))
    padded = cost.copy()
    padded[:, 7:] = np.nan
    assert np.array_equal(solve(padded, np.array([7]), **way), solve(cost, np.array([7]), **way))


def test_no_access_out_of_bounds():
    process = run_with_address_sanitizer(emulated_linear_assignment.__file__, build(BINDING, "addresses"))
    assert process.returncode == 0, process.stderr


# --- Bugs planted in the kernel, each of which the tests must find ---


def change(file, *replacements):
    return {"defines": ["FLOAT32_ONLY"], "changes": {file: list(replacements)}}


NO_BARRIER = {
    "in the minimum of a block": (TEAM, ("      __syncthreads();\n      own = {", "      own = {")),
    "between the uses of a buffer": (TEAM, ("      turn_ ^= 1;\n", "")),
    "between chunks of rows": (SOLVER, ("__popc(winners);\n      __syncwarp();\n", "__popc(winners);\n")),
    "after the row minima": (
        SOLVER,
        ("some_unusable = team_.any(!all_usable);", "some_unusable = false;"),
        ("if (some_unusable) find_sentinel();\n    team_.sync();\n", "if (some_unusable) find_sentinel();\n"),
    ),
    "after a path": (SOLVER, ("    ++num_slots_;\n    team_.sync();\n", "    ++num_slots_;\n")),
}
PLAIN_UPDATE = (SOLVER, ("atomicOr(&w_.taken[column / 32], ", "w_.taken[column / 32] |= ("))


@pytest.mark.parametrize("place", NO_BARRIER)
def test_missing_barrier_is_found(place):
    broken = emulate(**change(*NO_BARRIER[place]))
    make = crowd if place == "between the uses of a buffer" else ties  # whose searches have turns enough
    with pytest.raises(KernelError, match="race in shared memory"):
        broken(*problems(make, (1, 40, 45)), schedule=1)


@pytest.mark.parametrize("place", ["between chunks of rows", "after the row minima", "after a path"])
def test_missing_barrier_is_found_where_one_warp_searches_what_others_copied(place):
    broken = emulate(**change(*NO_BARRIER[place]))
    with pytest.raises(KernelError, match="race in shared memory"):
        broken(*problems(ties, (1, 40, 45)), schedule=1, **SHARED)


@pytest.mark.parametrize(
    ("file", "replacement", "message"),
    [
        (*PLAIN_UPDATE, "race in shared memory"),
        (SOLVER, ("if (team_.rank() == 0) {\n      w_.taken", "{\n      w_.taken"), "race in shared memory"),
        (SOLVER, ("(team_.warp() == 0) match_free", "(team_.rank() < 16) match_free"), "deadlock"),
        (
            SOLVER,
            ("= __ballot_sync(kAllLanes, wins)", "= exists ? __ballot_sync(kAllLanes, wins) : 0"),
            "lanes disagree",
        ),
    ],
    ids=["plain update", "every thread matches the path", "half a warp", "warp-wide call in a branch"],
)
def test_planted_bug_is_reported(file, replacement, message):
    broken = emulate(**change(file, replacement))
    with pytest.raises(KernelError, match=message):
        broken(*problems(ties, (1, 40, 45)), schedule=1)


@pytest.mark.parametrize(
    "replacement",
    [
        ("if (all.rank() >= kSearchThreads) return;", ""),
        ("reinterpret_cast<T*>(memory + used)", "reinterpret_cast<T*>(memory + used - 32)"),
    ],
    ids=["every warp searches alone", "costs over the workspace"],
)
def test_planted_bug_of_shared_costs_is_found(replacement):
    broken = emulate(**change(KERNEL, replacement))
    cost, num_targets = problems(crowd, (1, 20, 45))
    with pytest.raises(KernelError, match="race in shared memory"):
        broken(cost, num_targets, schedule=1, **SHARED)


def test_lost_update_needs_preemption_to_show():
    broken = emulate(**change(*PLAIN_UPDATE))
    cost, num_targets = problems(normal, (4, 20, 40))
    wanted = expected(cost, num_targets)
    results = [broken(cost, num_targets, schedule=schedule, ignore_races=True) for schedule in range(8)]
    assert np.array_equal(results[0], wanted)  # one thread after the other loses nothing
    assert not all(np.array_equal(result, wanted) for result in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "replacement"),
    [
        (SOLVER, ("columns; column += kWarpSize) {\n#pragma", "columns + 1; column += kWarpSize) {\n#pragma")),
        (SOLVER, ("column = team_.rank(); column < costs_.col", "column = team_.rank(); column <= costs_.col")),
        (SOLVER, ("min(first + r, costs_.rows - 1)", "min(first + r, costs_.rows)")),
        (KERNEL, ("target = team.rank(); target < batch.targets;", "target = team.rank(); target <= batch.targets;")),
        (SOLVER, ("team_.lane() == 0 && first + r < costs_.rows", "team_.lane() == 0")),
        (
            KERNEL,
            ("static_cast<size_t>(rows) * columns * sizeof", "static_cast<size_t>(rows) * (columns - 1) * sizeof"),
        ),
    ],
    ids=["column", "free column", "row", "target", "last rows", "room for costs"],
)
def test_off_by_one_is_found(file, replacement):
    library = build(BINDING, "addresses", **change(file, replacement))
    process = run_with_address_sanitizer(emulated_linear_assignment.__file__, library, "float32 only")
    assert process.returncode != 0
    assert "AddressSanitizer" in process.stderr


# --- On a GPU ---


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EVERY_WAY = [{"shared_costs": shared, "fixed_point": fixed} for shared in (False, True) for fixed in (False, True)]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_a_way_is_taken_on_a_gpu(way):
    cost, num_targets = torch.rand(7, 20, 300, device="cuda"), torch.full((7,), 20, device="cuda")
    with assignment_way(**way), torch.profiler.profile() as profile:
        ops.linear_assignment(cost, num_targets)
        torch.cuda.synchronize()
    threads = 128 if way["shared_costs"] else 32
    fixed, shared = (str(way[name]).lower() for name in ("fixed_point", "shared_costs"))
    kernel = f"solve_assignments<float, {threads}, 32, {fixed}, {shared}, true>"
    assert any(kernel in event.key for event in profile.key_averages())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(5, 1, 1), (7, 20, 300), (9, 33, 64), (40, 100, 300), (600, 20, 300), (3, 150, 200), (4, 40, 23), (2, 20, 1500)],
    ids=str,
)
def test_every_way_matches_the_cpu_kernel_on_a_gpu(shape, way):
    for make in (normal, ties, constant, crowd, exponents, unusable):
        for dtype in (np.float32, np.float64):
            cost, num_targets = problems(make, shape, dtype)
            wanted = torch.tensor(expected(cost, num_targets))
            inputs = torch.tensor(cost, device="cuda"), torch.tensor(num_targets, device="cuda")
            with assignment_way(**way):
                for _ in range(3):
                    assert torch.equal(ops.linear_assignment(*inputs).cpu(), wanted), (make, dtype)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
@pytest.mark.parametrize("targets", [20, 100])
def test_cuda_graph(targets, way):
    cost = torch.randn(6, 2, targets, 300, device="cuda")
    num_targets = torch.full((6, 2), targets, device="cuda")
    with assignment_way(**way):
        ops.linear_assignment(cost, num_targets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.linear_assignment(cost, num_targets)
    cost.copy_(torch.randn(6, 2, targets, 300))
    num_targets[1] = 3
    graph.replay()
    assert torch.equal(result.cpu(), ops.linear_assignment(cost.cpu(), num_targets.cpu()))
