"""linear_assignment against scipy (by total cost: optimal assignments are not unique) and against its reference."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from groupdetr_fast import ops
from groupdetr_fast.ops.linear_assignment.reference import linear_assignment_reference
from groupdetr_fast.testing import poisoned_memory

OP = torch.ops.groupdetr_fast.linear_assignment.default
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64]


def normal(*shape):
    return torch.randn(*shape)


def ties(*shape):
    return torch.randint(0, 4, shape).float()


def constant(*shape):
    return torch.full(shape, -2.5)


def crowd(*shape):
    """Every target wants the same queries, so that long augmenting paths arise."""
    return torch.rand(shape[-1]) * 10 + torch.rand(shape) * 0.01


def far_from_zero(*shape):
    return torch.rand(shape) + 1e4


def total_cost(cost, assigned):
    rows = (assigned >= 0).nonzero()[:, 0]
    return cost[rows, assigned[rows]].double().sum().item()


def assert_optimal(cost, size, assigned):
    """`assigned` [T] is a minimum-cost assignment of the first `size` rows of `cost` [T, N]."""
    cost, assigned = cost.cpu(), assigned.cpu()
    assert assigned.dtype == torch.int64
    assert (assigned[size:] == -1).all()
    queries = assigned[assigned >= 0].tolist()
    assert len(set(queries)) == len(queries) == min(size, cost.shape[1])
    assert all(query < cost.shape[1] for query in queries)
    best = cost[:size].double().numpy()
    best = best[linear_sum_assignment(best)].sum()
    assert total_cost(cost, assigned) == pytest.approx(best, rel=1e-12, abs=1e-9)


def assert_all_optimal(cost, num_targets, result):
    assert result.shape == cost.shape[:-1]
    sizes = num_targets.expand(cost.shape[:-2]).reshape(-1).tolist()
    problems = cost.reshape(len(sizes), *cost.shape[-2:])
    for size, problem, assigned in zip(sizes, problems, result.reshape(len(sizes), -1), strict=True):
        assert_optimal(problem, size, assigned)


def usable_problem(cost):
    """The problem that stands for a float32 `cost` [T, N] with unusable entries."""
    cost = cost.double().numpy()
    usable = np.abs(np.nan_to_num(cost, nan=INF)) <= 1e30
    if not usable.any():
        return np.zeros_like(cost)
    low, high = cost[usable].min(), cost[usable].max()
    spread = high - low or max(abs(high), 1)
    return np.where(usable, cost, high + (min(cost.shape) + 1) * spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [normal, ties, constant, crowd, far_from_zero], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 9), (2, 2), (5, 300), (20, 67), (33, 64), (31, 31), (70, 95), (9, 1), (40, 23)],
    ids=lambda size: str(size),
)
def test_total_cost_is_smallest(device, rows, columns, make, dtype):
    cost = make(3, rows, columns).to(device, dtype)
    num_targets = torch.full((3,), rows, device=device)
    assert_all_optimal(cost, num_targets, ops.linear_assignment(cost, num_targets))


def test_large_problem(device):
    cost = crowd(100, 300).to(device)
    assert_optimal(cost, 100, ops.linear_assignment(cost, torch.tensor(100, device=device)))


def test_float32_is_summed_in_float64(device):
    # In float32 the reduced costs of the large rows would lose the small differences.
    cost = torch.rand(12, 12) * torch.logspace(-3, 4, 12)[:, None]
    assert_optimal(cost, 12, ops.linear_assignment(cost.to(device), torch.tensor(12, device=device)))


def test_two_targets_that_sums_in_float32_cannot_tell_apart(device):
    """Costs as a matcher's, in a range of 8: no search that adds them up in float32 is right for both orders."""
    small = 2.0**-21
    cost = torch.tensor([[0.0, 8.0], [-small, 8.0]])
    gaps = cost[:, 1] - cost[:, 0]  # what a target pays to give up its cheapest query
    assert gaps[0] == gaps[1]
    assert gaps.double()[0] != (cost[1, 1].double() - cost[1, 0].double())
    for order, expected in (([0, 1], [1, 0]), ([1, 0], [0, 1])):
        ordered = cost[order]
        assigned = ops.linear_assignment(ordered.to(device), torch.tensor(2, device=device))
        assert assigned.tolist() == expected
        assert_optimal(ordered, 2, assigned)


@pytest.mark.parametrize(
    ("leading", "rows", "columns"), [((2,), 0, 5), ((2,), 3, 0), ((0,), 3, 5), ((2, 0), 0, 0), ((), 0, 0)], ids=str
)
def test_empty(device, leading, rows, columns):
    cost = torch.rand(*leading, rows, columns, device=device)
    result = ops.linear_assignment(cost, torch.full(leading, rows, device=device))
    assert result.shape == (*leading, rows)
    assert (result == -1).all()


def test_ragged(device):
    cost = torch.randn(4, 5, 12, 9, device=device)
    num_targets = torch.randint(0, 13, (4, 5), device=device)
    num_targets[0, 0], num_targets[0, 1] = 0, 12
    assert_all_optimal(cost, num_targets, ops.linear_assignment(cost, num_targets))


def test_padding_is_not_read(device):
    cost = torch.randn(7, 9, device=device)
    padded = torch.cat((cost, torch.full((3, 9), NAN, device=device)))
    num_targets = torch.tensor(7, device=device)
    expected = ops.linear_assignment(cost, num_targets)
    assert torch.equal(ops.linear_assignment(padded, num_targets)[:7], expected)


def test_number_of_targets_is_clamped(device):
    cost = torch.randn(2, 4, 6, device=device)
    result = ops.linear_assignment(cost, torch.tensor([-3, 99], device=device))
    assert (result[0] == -1).all()
    assert_optimal(cost[1], 4, result[1])


def test_view_per_group(device):
    layers, batch, groups, queries, rows = 2, 3, 4, 20, 6
    cost = torch.randn(layers, batch, rows, groups * queries, device=device)
    view = cost.unflatten(-1, (groups, queries)).transpose(-2, -3)  # [L, B, K, T, N]
    assert view.data_ptr() == cost.data_ptr()
    assert not view.is_contiguous()
    num_targets = torch.tensor([6, 0, 4], device=device)[:, None]
    result = ops.linear_assignment(view, num_targets)
    assert result.is_contiguous()
    assert torch.equal(result, ops.linear_assignment(view.contiguous(), num_targets))
    assert_all_optimal(view, num_targets, result)


@pytest.mark.parametrize(
    "view",
    [
        lambda cost: cost.transpose(-1, -2),
        lambda cost: cost[..., ::2],
        lambda cost: cost[:, ::3, 1:],
        lambda cost: cost[:1].expand(3, -1, -1),
        lambda cost: cost[:, :1].expand(-1, 5, -1),
        lambda cost: cost[..., :1],
    ],
    ids=["transposed", "every other column", "sliced", "expanded batch", "expanded rows", "one column"],
)
def test_strides(device, view):
    cost = view(torch.randn(3, 8, 21, device=device))
    num_targets = torch.full((cost.shape[0],), cost.shape[1], device=device)
    result = ops.linear_assignment(cost, num_targets)
    assert torch.equal(result, ops.linear_assignment(cost.contiguous(), num_targets))
    assert_all_optimal(cost, num_targets, result)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
def test_num_targets_broadcast(device, shape):
    cost = torch.randn(2, 3, 5, 8, device=device)
    num_targets = torch.randint(0, 6, shape, device=device)
    result = ops.linear_assignment(cost, num_targets)
    assert torch.equal(result, ops.linear_assignment(cost, num_targets.expand(2, 3).contiguous()))
    assert_all_optimal(cost, num_targets, result)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, torch.finfo(torch.float32).max, -3e38], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(6, 20), (12, 12), (15, 7)], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_unusable_costs(device, rows, columns, share, bad):
    cost = torch.randn(4, rows, columns)
    cost[torch.rand(cost.shape) < share] = bad
    result = ops.linear_assignment(cost.to(device), torch.full((4,), rows, device=device)).cpu()
    for problem, assigned in zip(cost, result, strict=True):
        usable = usable_problem(problem)
        assert_optimal(torch.from_numpy(usable), rows, assigned)
        rejected = (problem.double().abs() <= 1e30).logical_not()
        fewest = rejected.double().numpy()
        fewest = fewest[linear_sum_assignment(fewest)].sum()
        used = [rejected[row, query] for row, query in enumerate(assigned.tolist()) if query >= 0]
        assert sum(used) == fewest


@pytest.mark.parametrize("bad", [NAN, torch.finfo(torch.float32).max], ids=str)
def test_other_targets_stay_optimal(device, bad):
    cost = torch.randn(20, 300)
    others = [row for row in range(20) if row not in (3, 11)]
    cost[[3, 11]] = bad
    assigned = ops.linear_assignment(cost.to(device), torch.tensor(20, device=device)).cpu()
    assert_optimal(cost[others], 18, assigned[others])
    assert len(set(assigned.tolist())) == 20


def test_absurd_float64_magnitudes(device):
    cost = torch.randn(5, 9, dtype=torch.float64)
    cost[2] = torch.finfo(torch.float64).max
    large = cost.clone()
    large[0, 0] = 1e250  # absurd in float32 only
    for problem in (cost, large):
        assigned = ops.linear_assignment(problem.to(device), torch.tensor(5, device=device)).cpu()
        assert len(set(assigned.tolist())) == 5
    others = [0, 1, 3, 4]
    assert_optimal(cost[others], 4, ops.linear_assignment(cost.to(device), torch.tensor(5, device=device))[others])


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (5, 3)], ids=str)
def test_no_usable_cost(device, rows, columns, value):
    cost = torch.full((rows, columns), value, device=device)
    assigned = ops.linear_assignment(cost, torch.tensor(rows, device=device)).tolist()
    queries = [query for query in assigned if query >= 0]
    assert len(set(queries)) == len(queries) == min(rows, columns)


def test_one_usable_value(device):
    cost = torch.full((3, 3), NAN)
    cost[0, 2] = cost[1, 2] = cost[1, 0] = -7.0
    assigned = ops.linear_assignment(cost.to(device), torch.tensor(3, device=device))
    assert assigned.tolist() == [2, 0, 1]


COSTS = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 1e6, NAN, INF, -INF, 3e38])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_small_problems(data):
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    entries = data.draw(st.lists(COSTS, min_size=rows * columns, max_size=rows * columns))
    cost = torch.tensor(entries).view(rows, columns)
    size = torch.tensor(data.draw(st.integers(0, rows)))
    usable = torch.from_numpy(usable_problem(cost[:size]))
    assert_optimal(usable, size, ops.linear_assignment(cost, size)[:size])
    assert_optimal(usable, size, linear_assignment_reference(cost, size)[:size])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference(device, dtype):
    cost = torch.randn(2, 3, 9, 14, dtype=dtype, device=device)
    cost[0, 0, 2:4, 3:] = NAN
    num_targets = torch.tensor([[9, 0, 4], [1, 9, 8]], device=device)
    # With continuous costs the optimum is unique, so the indices agree too.
    assert torch.equal(linear_assignment_reference(cost, num_targets), ops.linear_assignment(cost, num_targets))
    wide = cost.transpose(-1, -2)  # more targets than queries
    assert_all_optimal(wide[1], num_targets[1], linear_assignment_reference(wide[1], num_targets[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_converted(device, dtype):
    cost = torch.randn(3, 8, 30, device=device).to(dtype)
    cost[0, 0] = INF
    num_targets = torch.tensor([8, 5, 0], device=device)
    assert torch.equal(ops.linear_assignment(cost, num_targets), ops.linear_assignment(cost.float(), num_targets))


def test_threads_and_runs_agree():
    cost = torch.cat((ties(80, 30, 90), crowd(80, 30, 90)))
    num_targets = torch.randint(0, 31, (160,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ops.linear_assignment(cost, num_targets))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


SCRIPT = """
import torch
from groupdetr_fast import ops
torch.manual_seed(0)
cost = torch.cat((torch.randint(0, 4, (20, 17, 45)).float(), torch.rand(45) * 10 + torch.rand(20, 17, 45) * 0.01))
cost[3, 2, 5] = float("nan")
n = torch.randint(0, 18, (40,))
print([ops.linear_assignment(cost.to(dtype), n).tolist() for dtype in (torch.float32, torch.float64)])
"""


def test_instruction_sets_agree(capsys):
    exec(SCRIPT, {})
    expected = capsys.readouterr().out
    assert len(expected) > 1000
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in ("default", "avx2")
    ]
    assert [run.communicate()[0] for run in runs] == [expected, expected]


def test_opcheck(device):
    cost = torch.randn(2, 3, 4, 7, device=device)
    num_targets = torch.randint(0, 5, (2, 3), device=device)
    torch.library.opcheck(OP, (cost, num_targets))
    torch.library.opcheck(OP, (cost.permute(1, 0, 3, 2), num_targets.t()))
    torch.library.opcheck(OP, (cost[:, :, :0], num_targets))


def test_uninitialised_memory_is_not_used(device):
    cost, num_targets = crowd(6, 20, 50).to(device), torch.arange(15, 21, device=device)
    expected = ops.linear_assignment(cost, num_targets)
    with poisoned_memory():
        assert torch.equal(ops.linear_assignment(cost, num_targets), expected)


def test_compiles_as_one_graph(device):
    compiled = torch.compile(ops.linear_assignment, fullgraph=True, backend="aot_eager")
    for rows in (4, 6):
        cost = torch.randn(2, 3, rows, 9, device=device).half()
        num_targets = torch.tensor([2, 0, 4], device=device)
        assert torch.equal(compiled(cost, num_targets), ops.linear_assignment(cost, num_targets))


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors(fake_device):
    with FakeTensorMode():
        cost = torch.empty(2, 9, 3, 7, device=fake_device).transpose(1, 2)
        result = ops.linear_assignment(cost, torch.empty(3, dtype=torch.int64, device=fake_device))
    assert result.shape == (2, 3, 9)
    assert result.dtype == torch.int64
    assert result.is_contiguous()
    assert result.device.type == fake_device


def test_cost_that_requires_a_gradient(device):
    cost = torch.randn(3, 5, device=device, requires_grad=True)
    result = ops.linear_assignment(cost * 2, torch.tensor(3, device=device))
    assert not result.requires_grad
    assert_optimal(cost.detach(), 3, result)


@pytest.mark.parametrize(
    ("cost", "num_targets", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor(2), TypeError, "cost must be float32.*got torch.int64"),
        (torch.zeros(2, 3), torch.tensor(2.0), TypeError, "num_targets must be int64, got torch.float32"),
        (
            torch.zeros(2, 3),
            torch.tensor(2, dtype=torch.int32),
            TypeError,
            "num_targets must be int64, got torch.int32",
        ),
        (torch.zeros(2, 3), 2, TypeError, "num_targets must be int64, got no tensor: 2"),
        (torch.zeros(3), torch.tensor(2), ValueError, r"cost must have shape \[..., T_max, N\], got \[3\]"),
        (torch.zeros(4, 2, 3), torch.zeros(3).long(), ValueError, r"leading shape \[4\] of cost, got \[3\]"),
        (torch.zeros(2, 3), torch.zeros(1).long(), ValueError, r"leading shape \[\] of cost, got \[1\]"),
        (torch.zeros(2, 3), torch.zeros((), device="meta").long(), ValueError, "device of cost, cpu, got meta"),
    ],
)
def test_errors(cost, num_targets, error, message):
    with pytest.raises(error, match=message):
        ops.linear_assignment(cost, num_targets)


def test_kernel_rejects_what_it_would_misread():
    if ops.backends()["linear_assignment"]["cpu"] != "C++":
        pytest.skip("the C++ kernel is not built")
    with pytest.raises(RuntimeError, match="float32 or float64"):
        OP(torch.zeros(2, 3).half(), torch.tensor(2))
    with pytest.raises(RuntimeError, match="leading shape"):
        OP(torch.zeros(4, 2, 3), torch.tensor([2]))
    with pytest.raises(RuntimeError, match="int64"):
        OP(torch.zeros(2, 3), torch.tensor(2, dtype=torch.int32))
