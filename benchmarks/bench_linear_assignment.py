"""All assignment problems of one training step: the op against loops over scipy and lap."""

import cases
import lap
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from groupdetr_fast import PackedTargets, ops


def solve_with_op(cost):
    return ops.linear_assignment(cost, torch.full(cost.shape[:-2], cost.shape[-2])).numpy()


def solve_with_scipy(cost):
    problems = cost.flatten(0, -3).numpy()
    return np.stack([linear_sum_assignment(problem)[1] for problem in problems])


def solve_with_lap(cost):
    problems = cost.flatten(0, -3).numpy()
    return np.stack([lap.lapjv(problem, extend_cost=True)[1] for problem in problems])


@pytest.mark.parametrize("solve", [solve_with_op, solve_with_scipy, solve_with_lap])
@pytest.mark.parametrize("case", cases.MATCHING, ids=str)
def bench_linear_assignment(benchmark, case, solve):
    benchmark.group = f"linear_assignment {case}"
    if solve is solve_with_lap and case.targets > 20:
        pytest.skip("lap pads the problem to a square: seconds per call")
    torch.set_num_threads(1)
    out, targets = case.make()
    cost = ops.matching_cost(out.logits, out.boxes, PackedTargets.from_list(targets))
    cost = cost.unflatten(-1, (case.num_groups, case.num_queries)).movedim(-2, -3).contiguous()
    assignment = torch.from_numpy(solve(cost).reshape(*cost.shape[:-1])).long()
    total = cost.double().gather(-1, assignment[..., None]).sum()
    best = cost.double().gather(-1, torch.from_numpy(solve_with_scipy(cost)).view(*cost.shape[:-1], 1)).sum()
    torch.testing.assert_close(total, best, rtol=1e-9, atol=0)
    benchmark(solve, cost)
