"""All assignment problems of one training step, on one thread.

A DETR has its costs as [queries, targets], and that is what the peers get. This package's cost comes as
[targets, queries]; two peers are timed on that layout too, as it may suit them better.

How hard a problem is depends on the predictions: where queries lie around the same few objects, or nowhere near any,
they compete for targets. So the fastest peers are compared on four kinds of them.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from groupdetr_fast import PackedTargets, ops
from harness import cases, peers
from harness.results import OURS


def with_op(by_target):
    cost = torch.from_numpy(by_target)
    return ops.linear_assignment(cost, torch.full(cost.shape[:1], cost.shape[1])).numpy()


def with_scipy(costs):
    return [linear_sum_assignment(cost) for cost in costs]


def with_lap(costs):
    import lap

    return [lap.lapjv(cost, extend_cost=True, return_cost=False)[0] for cost in costs]


def with_lapx(costs):
    return peers.lapx().lapjvr_batch(costs, extend_cost=True, return_cost=False, n_threads=1)


def with_lapcpp(costs):
    import lapcpp

    return lapcpp.lapjv_batch(costs, extend_cost=True, return_cost=False, n_threads=1)


def pairs_of_columns(columns_of_rows):
    """(rows, columns) of each problem from the column of each row, -1 for none."""
    return [(np.flatnonzero(columns >= 0), columns[columns >= 0]) for columns in columns_of_rows]


class Solver(NamedTuple):
    solve: object
    layout: str
    pairs: object  # from what ``solve`` returns to (rows, columns) of each problem


SOLVERS = {
    OURS: Solver(with_op, "by_target", pairs_of_columns),
    "scipy": Solver(with_scipy, "by_query", list),
    "scipy, by target": Solver(with_scipy, "by_target", list),
    "lap": Solver(with_lap, "by_query", pairs_of_columns),
    "lapx": Solver(with_lapx, "by_query", lambda lists: list(zip(*lists, strict=True))),
    "lapcpp": Solver(with_lapcpp, "by_query", lambda lists: list(zip(*lists, strict=True))),
    "lapcpp, by target": Solver(with_lapcpp, "by_target", lambda lists: list(zip(*lists, strict=True))),
}

FEW = (OURS, "scipy", "lapcpp")


def prepare(case):
    out, targets = case.make()
    cost = ops.matching_cost(out.logits, out.boxes, PackedTargets.from_list(targets))
    by_target = cost.unflatten(-1, (case.num_groups, case.num_queries)).movedim(-2, -3).flatten(0, -3).numpy()
    costs = {
        "by_target": np.ascontiguousarray(by_target),
        "by_query": np.ascontiguousarray(by_target.transpose(0, 2, 1)),
    }

    def total_costs(name, solution):
        solver = SOLVERS[name]
        problems = zip(costs[solver.layout].astype(np.float64), solver.pairs(solution), strict=True)
        return [cost[rows, columns].sum() for cost, (rows, columns) in problems]

    def check(result):
        name, solution = result
        assert all(len(rows) == case.targets for rows, _ in SOLVERS[name].pairs(solution)), "a target has no query"
        best = total_costs("scipy", with_scipy(costs["by_query"]))
        np.testing.assert_allclose(total_costs(name, solution), best, rtol=1e-9, atol=1e-9)

    def run(name):
        return name, SOLVERS[name].solve(costs[SOLVERS[name].layout])

    return {name: functools.partial(run, name) for name in (SOLVERS if case.predictions == "trained" else FEW)}, check


@pytest.mark.parametrize("contender", SOLVERS)
@pytest.mark.parametrize("case", cases.ASSIGNMENT, ids=str)
def bench_linear_assignment(comparison, case, contender):
    comparison("linear_assignment", case, contender, prepare, x="targets", threads=1)


@pytest.mark.parametrize("contender", FEW)
@pytest.mark.parametrize("case", cases.ASSIGNMENT, ids=str)
@pytest.mark.parametrize("predictions", cases.OTHER_PREDICTIONS)
def bench_linear_assignment_of_other_predictions(comparison, predictions, case, contender):
    case = replace(case, predictions=predictions)
    comparison(f"linear_assignment_{predictions}", case, contender, prepare, x="targets", threads=1, seconds=6)
