"""What the searches of linear_assignment are made of, without a GPU: turns, and instructions on doubles in a turn.

    python benchmarks assignment_search turns           of the problems of a training step
    python benchmarks assignment_search instructions    of the GPU kernel, from its machine code
    python benchmarks assignment_search instructions --csrc OTHER_CHECKOUT/csrc

A turn looks at the costs of one target and at all matched queries, and waits for the turn before it. The turns are
those of the kernel's algorithm, written down once more for NumPy, which also solves the problems in float32.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import groupdetr_fast as gd
from harness import cases
from harness.places import RESULTS, ROOT

from . import sass
from .compilation import compile_cuda
from .loops import constant, disassemble
from .operators import COST, per_group

# Those whose loops are told apart here; GPUs of compute capability 8.6 and 8.9 run the code for 8.0.
ARCHITECTURES = [80, 90]
EXPONENTS = constant("kSpread")  # apart, at most, of costs that fixed point takes (csrc/linear_assignment.h)


class Turns(NamedTuple):
    """The problems of a case: turns of the search of all targets of one, by size of the problem.

    ``exponents`` is how far apart those of a problem's costs are at most, ``exact`` the share of problems that can be
    summed in fixed point, ``float32_worse`` that of those whose assignment costs more if it is summed in float32.
    """

    case: str
    problems: int
    mean: float
    most: int
    exponents: int
    exact: float
    float32_worse: float


def search(cost: np.ndarray, dtype: type) -> tuple[np.ndarray, int]:
    """The query of every target of ``cost`` [T, N], T <= N, summed in ``dtype``; and the turns that it took."""
    cost = cost.astype(dtype)
    shift, cheapest = cost.min(1), cost.argmin(1)
    slot_row, slot_column, waiting = [], [], []
    for row, column in enumerate(cheapest):
        if column in slot_column:
            waiting.append(row)
        else:
            slot_row.append(row)
            slot_column.append(column)
    row_slot = {row: slot for slot, row in enumerate(slot_row)}
    dual = np.zeros(len(slot_row), dtype)
    turns = 0
    for source in waiting:
        slots = np.array(slot_column)
        free = np.ones(cost.shape[1], bool)
        free[slots] = False
        distance, previous = np.full(len(slots), np.inf, dtype), np.zeros(len(slots), int)
        scanned = np.zeros(len(slots), bool)
        row, offset, path = source, dtype(0), (dtype(np.inf), source, -1)
        while True:
            turns += 1
            column = np.flatnonzero(free)[cost[row, free].argmin()]
            length = offset + (cost[row, column] - shift[row])
            if length < path[0]:
                path = (length, row, column)
            lengths = cost[row, slots] - shift[row] - dual + offset
            shorter = ~scanned & (lengths < distance)
            distance[shorter], previous[shorter] = lengths[shorter], row
            slot = np.where(scanned, np.inf, distance).argmin()
            if scanned.all() or not distance[slot] < path[0]:
                break
            scanned[slot] = True
            row = slot_row[slot]
            offset = distance[slot] - (cost[row, slots[slot]] - shift[row] - dual[slot])
        dual = np.append(np.where(scanned, dual + (distance - path[0]), dual), dtype(0))
        slot, row = len(slots), path[1]
        slot_column.append(path[2])
        slot_row.append(row)
        while row != source:
            slot_row[slot], row_slot[row], slot = row, slot, row_slot[row]
            row = previous[slot]
        slot_row[slot], row_slot[source] = source, slot
    return np.array([slot_column[row_slot[row]] for row in range(len(cost))]), turns


def turns_of(case: cases.Matching) -> Turns:
    out, targets = case.make()
    cost = gd.ops.matching_cost(out.logits, out.boxes, gd.PackedTargets.from_list(targets), **COST)
    problems = per_group(cost, case).flatten(0, -3).numpy()
    spreads = [spread(problem) for problem in problems]
    turns, worse = [], 0
    for problem in problems:
        best, number = search(problem, np.float64)
        rounded, _ = search(problem, np.float32)
        totals = [np.take_along_axis(problem.astype(float), found[:, None], 1).sum() for found in (best, rounded)]
        turns.append(number)
        worse += totals[1] > totals[0]
    exact = float(np.mean([apart is not None and apart <= EXPONENTS for apart in spreads]))
    mean, share = round(float(np.mean(turns)), 1), worse / len(problems)
    apart = max((apart for apart in spreads if apart is not None), default=0)
    return Turns(str(case), len(problems), mean, max(turns), apart, exact, round(share, 4))


def spread(problem: np.ndarray) -> int | None:
    """How far apart the exponents of costs are, zeros apart; None if a cost is too small for a normal float32."""
    magnitudes = np.abs(problem[problem != 0])
    if magnitudes.size == 0:
        return 0
    if magnitudes.min() < np.finfo(np.float32).tiny:
        return None
    exponents = np.frexp(magnitudes)[1]
    return int(exponents.max() - exponents.min())


class Instructions(NamedTuple):
    """The loop of a turn in a kernel: all its instructions, and those on doubles for a slot and for the rest."""

    kernel: str
    architecture: int
    instructions: int
    of_slot: float
    of_turn: int


def instructions_of(source: Path, architecture: int) -> Iterator[Instructions]:
    """Of the kernels for float32 whose arrays are in shared memory."""
    compiled = compile_cuda(source, architecture)
    kernels = sass.read(disassemble(compiled.cubin))
    for symbol, usage in compiled.usages.items():
        name = usage.kernel.removeprefix(f"{source.stem}/")
        if "<float" in name and name.endswith("true>"):
            for instructions in turns_in(kernels[symbol]):
                yield Instructions(name, architecture, *instructions)


def turns_in(kernel: sass.Kernel) -> Iterator[tuple[int, float, int]]:
    """Every loop of a turn: one for sums in doubles, and one for fixed point where a kernel has that.

    It is the smallest loop in which lanes look for a minimum around the loop over slots that stores a row, 32 bits.
    Each copy of the latter's body reads one flag, a byte.
    """
    loops = sass.loops(kernel)
    inner = [loop for loop in loops if not any(other.is_in(loop) for other in loops)]
    for loop in sorted(inner, key=lambda loop: loop.first):
        of_body = sass.of(kernel, loop)
        around = [one for one in loops if loop.is_in(one) and has_reduction(sass.of(kernel, one))]
        if around and flags(of_body) > 1 and stores_rows(of_body):
            of_turn = sass.of(kernel, min(around, key=lambda one: len(one.indices)))
            of_slot = doubles(of_body) / flags(of_body)
            yield len(of_turn), of_slot, round(doubles(of_turn) - of_slot * flags(of_turn))


def has_reduction(instructions: Sequence[sass.Instruction]) -> bool:
    return any(one.opcode.endswith("REDUX") for one in instructions)


def stores_rows(instructions: Sequence[sass.Instruction]) -> bool:
    return any((one.opcode, one.modifiers) == ("STS", "") for one in instructions)


def flags(instructions: Sequence[sass.Instruction]) -> int:
    return sum(one.opcode == "LDS" and one.modifiers.startswith("U8") for one in instructions)


def doubles(instructions: Sequence[sass.Instruction]) -> int:
    """Those that the units for doubles execute, conversions from and to doubles among them."""
    return sum(one.kind == "double" for one in instructions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["turns", "instructions"])
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="the sources, by default our own")
    parser.add_argument("--csv", type=Path, help="where the table goes (default: in results, as assignment_WHAT.csv)")
    options = parser.parse_args()
    if options.what == "turns":
        torch.manual_seed(0)
        kinds = ("trained", "random", "early", "crowded")
        rows = [turns_of(replace(case, predictions=kind)) for case in cases.GPU_MATCHING for kind in kinds]
    else:
        source = options.csrc / "cuda" / "linear_assignment.cu"
        rows = [row for architecture in options.architectures for row in instructions_of(source, architecture)]
    target = options.csv or RESULTS / f"assignment_{options.what}.csv"
    with target.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0]._fields, *rows])
    for row in [rows[0]._fields, *rows]:
        print("  ".join(map(str, row)))
