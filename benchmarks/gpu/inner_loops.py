"""Counts the instructions of the inner loop of every Triton kernel by kind, from its machine code, without a GPU.

    python benchmarks inner_loops --only cross_attention --architectures 90

What a loop has more of than its peers is where to look first; how long it takes is for a GPU to say. Kernels are
compiled in the configurations that compile_gpu compiles. The disassembler is the one that Triton brings along.
"""

import argparse
import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from groupdetr_fast.ops._triton import CompileCase
from harness.places import RESULTS

from .compilation import SHARED_MEMORY, triton_cases

TABLE = RESULTS / "inner_loops.csv"

# By the opcode, up to its first dot; the first kind that matches. U* are of the unit that works once for a whole warp.
KINDS = {
    "tensor": r"[HIQDO]G?MMA|UTC\w*MMA",
    "exponential": r"MUFU",
    "memory": r"LD|LDG|LDGSTS|ST|STG|RED|ATOM|ATOMG|UBLK\w+|UTMA\w+",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDT|STT|LDTM|STTM",
    "exchange": r"SHFL|REDUX|VOTE|MATCH",
    "uniform": r"U[A-Z0-9]+|R2UR",
    "float": r"[FHD](ADD|MUL|FMA|MNMX|SEL|SETP|SET|SWZADD)\w*|F2\w+|I2F\w*|FRND|FCHK",
    "integer": r"I[A-Z0-9]+|V[A-Z0-9]+|LOP3|LEA|SHF|SHL|SHR|PRMT|SEL|MOV|PLOP3|LOP|BMSK|POPC|CS2R|S2R|P2R|R2P",
    "control": r"BRA|BSSY|BSYNC|BAR|WARP\w+|\w*DEPBAR|SYNCS|NOP|EXIT|CALL|RET|YIELD|NANOSLEEP|FENCE|MEMBAR",
}
PRODUCTS = re.compile(r"[HIQDO]G?MMA|UTC\w*MMA|FFMA|DFMA")

# Of a multiprocessor (CUDA programming guide, technical specifications per compute capability): threads, blocks, bytes
# of shared memory; of these, a block takes 1 KB for the system.
MULTIPROCESSORS = {80: (2048, 32, 164 << 10), 90: (2048, 32, 228 << 10)}
MULTIPROCESSORS |= {100: (2048, 32, 228 << 10), 120: (1536, 24, 100 << 10)}
REGISTERS, REGISTERS_AT_A_TIME = 64 << 10, 256  # a warp gets so many at a time


class Loop(NamedTuple):
    """A kernel's inner loop: instructions in all and by kind; ``blocks`` is how many fit a multiprocessor at a time."""

    kernel: str
    architecture: int
    blocks: int
    instructions: int
    tensor: int
    exponential: int
    memory: int
    shared: int
    exchange: int
    uniform: int
    float: int
    integer: int
    control: int
    other: int


def inner_loop(assembly: str) -> list[str]:
    """The opcodes of a kernel's inner loop; ``assembly`` is what nvdisasm prints of the kernel.

    It is the longest loop that multiplies and has no other such loop in it. Of a kernel without products, it is the
    longest one that has no other in it; without any loop, the list is empty.
    """
    suffixed, loops = loops_of(assembly)
    opcodes = [opcode.partition(".")[0] for opcode in suffixed]
    multiplying = {loop for loop in loops if any(PRODUCTS.fullmatch(opcode) for opcode in opcodes[slice(*loop)])}
    candidates = multiplying or loops
    inner = [
        (start, end)
        for start, end in candidates
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in candidates)
    ]
    return opcodes[slice(*max(inner, key=lambda loop: loop[1] - loop[0]))] if inner else []


def loops_of(assembly: str) -> tuple[list[str], set[tuple[int, int]]]:
    """The opcodes of a kernel as ``DADD`` or ``LDS.U8``, and its loops as slices of them."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[str, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);", line):
            opcodes.append(instruction.group(1))
            jumped = re.search(r"`\((\.L\w+)\)", instruction.group(2))
            if opcodes[-1].partition(".")[0] == "BRA" and jumped:
                jumps.append((jumped.group(1), len(opcodes)))
    # A jump to itself is what a kernel ends with.
    return opcodes, {(labels[label], end) for label, end in jumps if label in labels and labels[label] < end - 1}


def count_kinds(opcodes: Sequence[str]) -> Counter[str]:
    """How many are of which kind of :data:`KINDS`, or ``"other"``."""
    found: Counter[str] = Counter()
    for opcode in opcodes:
        found[next((kind for kind, names in KINDS.items() if re.fullmatch(names, opcode)), "other")] += 1
    return found


def blocks_at_a_time(architecture: int, warps: int, registers: int, shared_memory: int) -> int:
    """How many blocks of a kernel fit a multiprocessor; registers are those of a thread, memory is in bytes."""
    threads, blocks, memory = MULTIPROCESSORS[architecture]
    of_warp = -(-32 * registers // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    return min(blocks, threads // (32 * warps), REGISTERS // of_warp // warps, memory // (shared_memory + 1024))


def measure(case: CompileCase, architecture: int) -> Loop:
    """Compile one configuration, and look at its loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attributes())
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        assembly = disassembled(cubin)
        resources = _output(_tool("cuobjdump"), "--dump-resource-usage", cubin)
    registers = int(re.search(r"REG:(\d+)", resources).group(1))
    opcodes = inner_loop(assembly)
    kinds = count_kinds(opcodes)
    blocks = blocks_at_a_time(architecture, case.num_warps, registers, compiled.metadata.shared)
    return Loop(case.name, architecture, blocks, len(opcodes), *(kinds[kind] for kind in Loop._fields[4:]))


def disassembled(cubin: Path) -> str:
    """The machine code of all kernels in a file, a section for each."""
    return _output(_tool("nvdisasm"), "-c", cubin)


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels in whose name this regular expression is found")
    parser.add_argument("--architectures", type=int, nargs="+", default=[90], choices=SHARED_MEMORY)
    parser.add_argument("--csv", type=Path, default=TABLE, help="where the table goes")
    options = parser.parse_args()
    cases = [case for case in triton_cases() if re.search(options.only, case.name)]
    loops = [measure(case, architecture) for architecture in options.architectures for case in cases]
    with options.csv.open("w", newline="") as file:
        csv.writer(file).writerows([Loop._fields, *loops])
    print(_table(loops))


def _table(loops: Sequence[Loop]) -> str:
    rows = [Loop._fields, *(tuple(map(str, loop)) for loop in loops)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
