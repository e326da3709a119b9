"""What grouped attention's backward pass executes for a group of a head, in one kernel and in two, without a GPU.

    python benchmarks attention_backward
    python benchmarks attention_backward --architectures 80 90 --queries 300 --tile 320 16 2

Of both ways that the op can go (groupdetr_fast/ops/grouped_attention/one_block.py), in bfloat16, for heads of 32
channels: instructions in the loops that multiply, from their machine code, times the turns that these make. Numbers are
those of all warps. These are counts, not times. Kernels that spill are named. With --tile the one kernel alone is
compiled, with another tile, and nothing is written.
"""

import argparse
import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.places import RESULTS

from . import sass
from .compilation import SHARED_MEMORY, compile_triton
from .compile_gpu import read, table
from .loops import blocks_at_a_time, disassemble

ROWS = RESULTS / "attention_backward.csv"
CHANNELS = 32
KINDS = ("memory", "shared", "uniform", "float", "integer", "control")


class Count(NamedTuple):
    """Of one group: instructions of warps in all and by kind, multiplications with additions, exponentials.

    ``registers`` are those of a thread, of the kernel with more of them, and ``warps`` those that share a
    multiprocessor, of the kernel with fewer.
    """

    architecture: int
    queries: int
    dropout: bool
    way: str
    programs: int
    registers: int
    warps: int
    multiply_adds: int
    exponentials: int
    instructions: int
    memory: int
    shared: int
    uniform: int
    float: int
    integer: int
    control: int


def counts(architecture: int, queries: int, dropout: bool, tile: Sequence[int] | None = None) -> Iterator[Count]:
    """Two kernels, then one; with a ``tile``, which is a block, a step and stages, the latter alone."""
    from groupdetr_fast.ops.grouped_attention import triton_cases, triton_launch

    kernels = list(triton_launch._TILES)[1:]
    tiles = [triton_launch._tile(kernel, "half", CHANNELS, CHANNELS, queries) for kernel in kernels]
    two = [
        (triton_cases.compile_case(kernel, "half", CHANNELS, tile, dropout), tile.step, math.ceil(queries / tile.block))
        for kernel, tile in zip(kernels, tiles, strict=True)
    ]
    own = triton_launch._one_block_tile(queries)
    if tile is not None:
        own = triton_launch.Tile(*tile[:2], own.num_warps, tile[2])
    one = [(triton_cases.one_block_case(CHANNELS, queries, dropout, tile=own), own.step, 1)]
    ways = {"two kernels": two, "one kernel": one} if tile is None else {"one kernel": one}
    for way, cases in ways.items():
        sums, registers, warps = dict.fromkeys(Count._fields[7:], 0), [], []
        for case, step, programs in cases:
            compiled = compile_triton(case, architecture)
            (usage,) = compiled.usages.values()
            (kernel,) = sass.read(disassemble(compiled.cubin)).values()
            for loop in multiplying_loops(kernel):
                times = programs * math.ceil(queries / step) * case.num_warps
                for name, number in in_a_turn(loop).items():
                    sums[name] += times * number
            registers.append(usage.registers)
            for problem in usage.problems():
                print(problem)
            blocks = blocks_at_a_time(architecture, case.num_warps, usage.registers, usage.shared_memory)
            warps.append(blocks * case.num_warps)
        programs = sum(number for *_, number in cases)
        yield Count(architecture, queries, dropout, way, programs, max(registers), min(warps), **sums)


def multiplying_loops(kernel: sass.Kernel) -> list[list[sass.Instruction]]:
    """The loops that multiply and have no other such loop in them; each is a walk along queries or keys."""
    found = [(loop, sass.of(kernel, loop)) for loop in sass.loops(kernel)]
    found = [(loop, code) for loop, code in found if any(instruction.multiplies for instruction in code)]
    return [code for loop, code in found if not any(other.is_in(loop) for other, _ in found)]


def in_a_turn(code: Sequence[sass.Instruction]) -> dict[str, int]:
    """What a warp does in a turn of a loop, by the names of :class:`Count`."""
    kinds = sass.count_kinds(code)
    exponentials = sum(instruction.opcode == "MUFU" and instruction.modifiers == "EX2" for instruction in code)
    return {
        "multiply_adds": sum(map(multiply_adds, code)),
        "exponentials": 32 * exponentials,
        "instructions": len(code),
        **{kind: kinds[kind] for kind in KINDS},
    }


def multiply_adds(instruction: sass.Instruction) -> int:
    """Of a warp; a group of four warps shares the product of HGMMA.

    Raises:
        ValueError: if it is a product of unknown shape.
    """
    if instruction.kind != "tensor":
        return 0
    shape = instruction.modifiers.split(".")[0]
    if instruction.opcode == "HMMA" and shape in ("16816", "1688"):
        return 16 * 8 * int(shape[3:])
    if instruction.opcode == "HGMMA" and re.fullmatch(r"\d+x\d+x\d+", shape):
        return math.prod(map(int, shape.split("x"))) // 4
    raise ValueError(f"the size of {instruction.opcode}.{instruction.modifiers} is not known")


def update(path: Path, found: Sequence[Count]) -> None:
    """Write counts into a table; rows of other sizes and architectures stay there."""

    def key(row: Sequence[object]) -> tuple[str, ...]:
        return tuple(map(str, row[:4]))

    rows = {key(list(row.values())): list(row.values()) for row in read(path)} if path.exists() else {}
    rows |= {key(count): list(count) for count in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        ordered = sorted(rows.values(), key=lambda row: (int(row[0]), int(row[1]), str(row[2]), row[3] == "one kernel"))
        csv.writer(file).writerows([Count._fields, *ordered])


def is_tile(block: int, step: int, stages: int) -> bool:
    """Whether the one kernel can be compiled with it."""
    return min(block, stages) >= 1 and block % 64 == 0 and step >= 16 and step & (step - 1) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [architecture for architecture in SHARED_MEMORY if 80 <= architecture < 100 or architecture == 120]
    parser.add_argument("--architectures", type=int, nargs="+", default=known, choices=known)
    parser.add_argument("--queries", type=int, nargs="+", default=[100, 300], help="of a group, up to 320")
    parser.add_argument("--tile", type=int, nargs=3, metavar=("BLOCK", "STEP", "STAGES"), help="of the one kernel")
    parser.add_argument("--csv", type=Path, default=ROWS, help="where the table goes")
    options = parser.parse_args()
    from groupdetr_fast.ops.grouped_attention.one_block import MAX_QUERIES

    if options.tile is not None and not is_tile(*options.tile):
        raise SystemExit("--tile: BLOCK must be a multiple of 64, STEP a power of 2 from 16 on, STAGES at least 1")
    if not all(1 <= queries <= MAX_QUERIES for queries in options.queries):
        raise SystemExit(f"--queries: one kernel serves groups of 1 to {MAX_QUERIES} queries")
    found = [
        count
        for architecture in options.architectures
        for queries in options.queries
        for dropout in (False, True)
        for count in counts(architecture, queries, dropout, options.tile)
    ]
    if options.tile is None:
        update(options.csv, found)
    print(table(Count._fields, found))
