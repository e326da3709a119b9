"""Turns of assignments, and doubles in a turn."""

import csv
import re

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from gpu import assignment_search, sass
from gpu.assignment_search import Turns, search, spread, turns_in, turns_of
from harness import cases
from harness.places import RESULTS

CLOSE_CALL = np.array([[0.0, 8.0], [-(2.0**-21), 8.0]], np.float32)  # float32 cannot tell what either gives up

ASSEMBLY = """
.text._kernel:
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   DADD R2, R2, R4 ;
.L_x_2:
        /*0020*/                   LDS.U8 R6, [R7] ;
        /*0030*/                   LDS.U8 R6, [R7+0x1] ;
        /*0040*/                   F2F.F64.F32 R2, R8 ;
        /*0050*/               @P0 DADD R2, R2, R4 ;
        /*0060*/                   DADD R2, R2, R4 ;
        /*0070*/                   DSETP.GEU.AND P0, PT, R2, R4, PT ;
        /*0080*/                   STS.64 [R9], R2 ;
        /*0088*/                   STS [R9], R2 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   LDS.U8 R6, [R7] ;
        /*00b0*/                   DADD R2, R2, R4 ;
        /*00c0*/                   F2F.F64.F32 R2, R8 ;
        /*00d0*/                   REDUX.MIN UR4, R2 ;
        /*00e0*/                   DSETP.GEU.AND P0, PT, R2, R4, PT ;
        /*00f0*/               @P3 BRA `(.L_x_1) ;
        /*0100*/                   REDUX.MIN UR4, R2 ;
        /*0110*/               @P4 BRA `(.L_x_0) ;
"""


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (20, 20), (30, 41)], ids=str)
def test_searches_solve_problems(shape):
    random = np.random.default_rng(0)
    cost = (random.random(shape[1]) * 10 + random.random(shape) * 0.01).astype(np.float32)
    found, turns = search(cost, np.float64)
    rows = np.arange(shape[0])
    assert sorted(set(found)) == sorted(found)
    assert cost.astype(float)[rows, found].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(dtype=float))
    assert turns >= shape[0] - len(set(cost.argmin(1)))


def test_float32_is_found_to_cost_more():
    assert search(CLOSE_CALL, np.float64)[0].tolist() == [1, 0]
    assert search(CLOSE_CALL[::-1], np.float64)[0].tolist() == [0, 1]
    in_float32 = [search(cost, np.float32)[0].tolist() for cost in (CLOSE_CALL, CLOSE_CALL[::-1])]
    assert in_float32 == [[0, 1], [0, 1]]


def test_turns_of_a_case():
    case = cases.Matching(5, layers=2, num_groups=2, num_queries=8, classes=3, predictions="early")
    row = turns_of(case)
    assert (row.case, row.problems) == (str(case), 2 * 2 * 2)
    assert 0 < row.mean <= row.most
    assert row.exact == float(row.exponents <= assignment_search.EXPONENTS) == 1


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        ([0.0, -0.0, 0.25, -0.375], 0),
        ([0.0, 2.0**-10, 2.0**-30], 20),
        ([0.0, 0.0], 0),
        ([8.0, -1.0], 3),
        ([0.0, 2.0**-126], 0),
        ([2.0**-126, 2.0**-127], None),
    ],
)
def test_how_far_apart_exponents_are(costs, wanted):
    assert spread(np.array([costs], np.float32)) == wanted


def test_doubles_of_a_turn():
    (kernel,) = sass.read(ASSEMBLY).values()
    (turn,) = turns_in(kernel)
    assert turn == (16, 2, 2)  # two copies of a slot in its loop, one after it; the first addition, the last comparison


def test_what_is_committed():
    with (RESULTS / "assignment_instructions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["architecture"] for row in rows} == {"80", "90"}
    # Of kernels for fixed point there are two loops, the first without doubles.
    with_fixed_point = [row for row in rows if re.search(r"<float, \d+, \d+, true", row["kernel"])]
    assert len(with_fixed_point) == 2 * len({(row["kernel"], row["architecture"]) for row in with_fixed_point}) > 0
    without_doubles = [row for row in rows if float(row["of_slot"]) == int(row["of_turn"]) == 0]
    assert {row["kernel"] for row in without_doubles} == {row["kernel"] for row in with_fixed_point}
    with (RESULTS / "assignment_turns.csv").open(newline="") as file:
        turns = list(csv.DictReader(file))
    assert len(turns) == 12
    assert list(turns[0]) == list(Turns._fields)
    assert all(int(row["exponents"]) <= assignment_search.EXPONENTS for row in turns)
