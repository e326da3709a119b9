"""Reads the machine code that nvdisasm prints: the loops of a kernel, and its instructions by kind."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

# By the opcode, up to its first dot; the first kind that matches. U* are of the unit that works once for a whole warp,
# and constants are mostly the same for one. Double precision is apart because most GPUs have little of it (those of
# consumers 1/64 of single precision), reductions in memory because they are sums, not transfers.
KINDS = {
    "tensor": r"[HIQDO]G?MMA|UTC\w*MMA",
    "exponential": r"MUFU",
    "reductions": r"REDG?|REDAS|ATOMG?|UBLKRED|UTMAREDG",
    "memory": r"LD|LDG|LDL|LDGSTS|ST|STG|STL|UBLK\w+|UTMA\w+",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDT|STT|LDTM|STTM",
    "exchange": r"SHFL|MOVM|C?REDUX|VOTEU?|MATCH",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR|CS2UR|LDCU?",
    "double": r"D(ADD|MUL|FMA|MNMX|SETP|SET)",
    "float": r"[FH](ADD|MUL|FMA|MNMX|SEL|SETP|SET|SWZADD)\w*|F2\w+|I2F\w*|FRND|FCHK",
    "integer": r"I[A-Z0-9]+|V[A-Z0-9]+|LOP3|LEA|SHF|SHL|SHR|PRMT|SEL|MOV|PLOP3|LOP|BMSK|SGXT|FLO|BREV|POPC|"
    r"CS2R|S2R|P2R|R2P",
    "control": r"BRA|BRX|BSSY|BSYNC|BREAK|BMOV|BAR|WARP\w+|ENDCOLLECTIVE|\w*DEPBAR|SYNCS|NOP|EXIT|CALL|RET|YIELD|"
    r"NANOSLEEP|FENCE|MEMBAR|ERRBAR|CCTL\w*|ELECT",
}
PRODUCTS = r"[HIQDO]G?MMA|UTC\w*MMA|FFMA2?|DFMA"
CONVERSIONS = r"F2\w+|I2F|FRND"  # of doubles where a modifier says so

# The threads that __launch_bounds__ allows, in the section that describes a kernel.
LIMIT = re.compile(r"\.section\s+\.nv\.info\.(\S+?),(?:(?!\.section\s)[\s\S])*?MAX_THREADS[\s\S]*?\.word\s+(\w+)")


class Frame(NamedTuple):
    """A line that an instruction is from; a chain of them leads from the kernel to the function inlined deepest."""

    file: str
    line: int


class Instruction(NamedTuple):
    """What nvdisasm prints on a line. ``modifiers`` is what follows the opcode's first dot."""

    opcode: str
    modifiers: str
    operands: str
    guarded: bool
    source: tuple[Frame, ...]

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`, or ``"other"``."""
        if re.fullmatch(CONVERSIONS, self.opcode) and "F64" in self.modifiers.split("."):
            return "double"
        return _kind(self.opcode)

    @property
    def multiplies(self) -> bool:
        return re.fullmatch(PRODUCTS, self.opcode) is not None

    @property
    def reduced(self) -> int:
        """Bytes that a thread adds to memory, or exchanges with it, by this instruction."""
        if self.kind != "reductions":
            return 0
        widths = (re.fullmatch(r"[BFUS]*(\d+)(?:(?:x|_V)(\d+))?", part) for part in self.modifiers.split("."))
        found = [int(width.group(1)) * int(width.group(2) or 1) // 8 for width in widths if width]
        return found[0] if found else 4


@cache
def _kind(opcode: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, opcode)), "other")


class Kernel(NamedTuple):
    """The code of a kernel. ``labels`` are indices of instructions; ``threads`` a block has at most, if it is known."""

    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int | None = None


def read(assembly: str) -> dict[str, Kernel]:
    """The kernels of a cubin by symbol; ``assembly`` is what nvdisasm prints, with -gi and -c or without.

    Text with no section in it is one kernel, whose symbol is empty.
    """
    kernels: dict[str, Kernel] = {}
    current, fresh = kernels.setdefault("", Kernel([], {})), True
    source: tuple[Frame, ...] = ()
    for line in assembly.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            current, source = kernels.setdefault(section.group(1), Kernel([], {})), ()
        elif label := re.match(r"\s*(\.L\w+):", line):
            current.labels[label.group(1)] = len(current.instructions)
        elif comment := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            # Before an instruction, the line deepest inside comes first, then those that it was inlined at.
            frame = Frame(comment.group(1), int(comment.group(2)))
            source, fresh = (frame, *(() if fresh else source)), False
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z]\w*)([.\w]*)(.*);", line):
            guard, opcode, modifiers, operands = found.groups()
            current.instructions.append(
                Instruction(opcode, modifiers.removeprefix("."), operands.strip(), guard is not None, source)
            )
            fresh = True
    threads = dict(LIMIT.findall(assembly))
    return {
        symbol: kernel._replace(threads=int(threads[symbol], 0) if symbol in threads else None)
        for symbol, kernel in kernels.items()
        if kernel.instructions
    }


class Cycle(NamedTuple):
    """A loop: the indices of its instructions, of the first one, and of the last jump that leads back to it."""

    indices: frozenset[int]
    first: int
    jump: int

    def is_in(self, other: "Cycle") -> bool:
        return self.indices < other.indices


def loops(kernel: Kernel) -> list[Cycle]:
    """The loops of a kernel.

    A loop is what leads from a jump back to where it jumps, from where alone the loop is entered. Code that a jump only
    leads to where the lanes of a warp are at different places (BRA.DIV) is in none: compilers repeat there what lies on
    the straight way.
    """
    starts, successors = _blocks(kernel)
    everything = _reached(successors, 0)
    found = []
    for head in sorted(everything):
        dominated = everything - _reached(successors, 0, without=head)
        latches = {block for block in dominated if head in successors[block]}
        if not latches:
            continue
        # Backwards from the jumps, within what the head leads to.
        before: dict[int, list[int]] = {block: [] for block in dominated}
        for block in dominated:
            for successor in successors[block]:
                if successor in before:
                    before[successor].append(block)
        body, waiting = {head}, list(latches - {head})
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += before[block]
        indices = frozenset(index for block in body for index in range(starts[block], starts[block + 1]))
        if len(indices) > 1:  # a jump to itself is what a kernel ends with
            found.append(Cycle(indices, starts[head], max(starts[latch + 1] - 1 for latch in latches)))
    return found


def _blocks(kernel: Kernel) -> tuple[list[int], list[list[int]]]:
    """Where the straight pieces of code start, the end included, and which of them follow each."""
    ends = [index for index, instruction in enumerate(kernel.instructions) if _leads(instruction) is not None]
    starts = sorted({0, len(kernel.instructions), *kernel.labels.values(), *(end + 1 for end in ends)})
    block_at = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    for block, next_start in enumerate(starts[1:]):
        last = kernel.instructions[next_start - 1]
        targets, falls_through = _leads(last) or ([], True)
        following = [block_at[kernel.labels[target]] for target in targets if target in kernel.labels]
        if falls_through:
            following.append(block + 1)
        successors.append([one for one in following if one < len(starts) - 1])
    return starts, successors


def _leads(instruction: Instruction) -> tuple[list[str], bool] | None:
    """The labels that an instruction jumps to, and whether it may go on to the next one; None if it only does that."""
    opcode, _, operands, guarded, _ = instruction
    if opcode in ("EXIT", "RET"):
        return [], guarded
    targets = re.findall(r"\.L\w+", operands)
    # For sm_80 and older compilers also write jumps within a kernel as calls that nothing returns from.
    if opcode not in ("BRA", "BRX", "JMP", "JMX") and not (opcode == "CALL" and targets):
        return None
    if instruction.modifiers in ("DIV", "CONV"):  # whether the lanes of a warp are at different places, or at one
        return (targets, False) if instruction.modifiers == "CONV" else ([], True)
    always = not guarded and (opcode in ("BRX", "JMX") or operands.startswith("`"))
    return targets, not always


def _reached(successors: Sequence[Sequence[int]], start: int, without: int | None = None) -> set[int]:
    found: set[int] = set()
    waiting = [start]
    while waiting:
        block = waiting.pop()
        if block not in found and block != without:
            found.add(block)
            waiting += successors[block]
    return found


def inner_loop(kernel: Kernel, around: int = 0) -> Cycle | None:
    """The inner loop of a kernel: the longest one that multiplies and has no other such loop in it.

    Of a kernel without products in loops, it is the longest one that has no other in it; without any loop, it is None.
    ``around`` says how many loops further out to look.
    """
    candidates = loops(kernel)
    multiplying = [loop for loop in candidates if any(kernel.instructions[index].multiplies for index in loop.indices)]
    candidates = multiplying or candidates
    inner = [loop for loop in candidates if not any(other.is_in(loop) for other in candidates)]
    chosen = max(inner, key=_length, default=None)
    for _ in range(around):
        chosen = min((loop for loop in candidates if chosen and chosen.is_in(loop)), key=_length, default=chosen)
    return chosen


def longest(kernel: Kernel, functions: Sequence[str], name: Callable[[Frame], str]) -> Cycle | None:
    """The longest loop that is in these functions, of which the last one has the loop itself; None if there is none.

    ``name`` tells the function of a line. A loop is where its jump back is from: of its other instructions some are
    from what surrounds it, as compilers move them.
    """
    wanted = tuple(functions)
    found = [loop for loop in loops(kernel) if _names(kernel.instructions[loop.jump], name)[-len(wanted) :] == wanted]
    return max(found, key=_length, default=None)


def of(kernel: Kernel, loop: Cycle | None) -> list[Instruction]:
    """The instructions of a loop in their order, none without a loop."""
    return [kernel.instructions[index] for index in sorted(loop.indices)] if loop else []


def reduced_in_a_turn(kernel: Kernel, loop: Cycle | None) -> int:
    """Bytes of reductions of a thread on the way through a loop that has most; of loops in it, one turn.

    Compilers write a branch down several times, of which a turn takes one.
    """
    if loop is None:
        return 0
    starts, successors = _blocks(kernel)
    most: dict[int, int] = {}
    ways = [(starts.index(loop.first), iter(successors[starts.index(loop.first)]))]
    while ways:
        block, following = ways[-1]
        under_way = {one for one, _ in ways}
        onward = next(
            (one for one in following if starts[one] in loop.indices and one not in {*most, *under_way}), None
        )
        if onward is not None:
            ways.append((onward, iter(successors[onward])))
            continue
        own = sum(kernel.instructions[index].reduced for index in range(starts[block], starts[block + 1]))
        # What is under way lies behind: a jump to it begins another turn.
        ahead = [most[one] for one in successors[block] if one in most]
        most[block] = own + max(ahead, default=0)
        ways.pop()
    return most[starts.index(loop.first)]


def _length(loop: Cycle) -> int:
    return len(loop.indices)


def _names(instruction: Instruction, name: Callable[[Frame], str]) -> tuple[str, ...]:
    names = [name(frame) for frame in instruction.source]
    # A lambda is in the function that defines it, and counts as a part of it.
    return tuple(one for one, before in zip(names, [None, *names], strict=False) if one != before)


def count_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many are of which kind of :data:`KINDS`, or ``"other"``."""
    return Counter(instruction.kind for instruction in instructions)
