"""What the inner loops of compiled kernels consist of, from their machine code."""

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from harness.places import ROOT

from . import sass
from .compilation import Compiled, Usage

# Of a multiprocessor (CUDA programming guide, technical specifications per compute capability): threads, blocks, bytes
# of shared memory, of which a block takes some for the system, and gets so many at a time (cuda_occupancy.h).
MULTIPROCESSORS = {75: (1024, 16, 64 << 10, 0, 256), 80: (2048, 32, 164 << 10, 1024, 128)}
MULTIPROCESSORS |= {90: (2048, 32, 228 << 10, 1024, 128), 100: (2048, 32, 228 << 10, 1024, 128)}
MULTIPROCESSORS |= {120: (1536, 24, 100 << 10, 1024, 128)}
QUARTERS = 4  # of a multiprocessor: each has registers of its own
REGISTERS, REGISTERS_AT_A_TIME = 16 << 10, 256  # of a quarter; a warp gets so many at a time

# The loops of kernels that the rule of sass.inner_loop does not do justice to, each by the functions that it is in, the
# innermost last; of several it is the longest. The assignment multiplies in none, and its longest loop looks up strides
# once: every cost is read by find_row_minima; a turn of augment, once for each slot that a search looks at, holds
# find_cheapest_free and relax. Deformable attention's products have a longer loop beside them, for weights that they
# do not serve.
NAMED = {
    "solve_assignments": {
        "find_row_minima": ("find_row_minima",),
        "augment": ("augment",),
        "find_cheapest_free": ("find_cheapest_free",),
        "relax": ("relax",),
    },
    "deform_count_chunks": {"for_samples": ("for_samples",)},
    "deform_scatter_chunks": {"for_samples": ("for_samples",)},
    "deform_forward_products": {"add_products": ("add_products",), "add_in_floats": ("add_in_floats",)},
}
# Kernels whose innermost loop makes one turn a sample: what else a sample takes is in the loop around it.
AROUND = {"deform_backward": 1}

# Samples that a turn of the loop is for, a number or a constant of csrc, and whether a group of lanes shares each.
SAMPLES: dict[str, tuple[int | str, bool]] = {
    "deform_backward": (1, True),
    "deform_backward_sorted": ("kMinGroup", True),
    "deform_count": ("kAtOnce", False),
    "deform_count_chunks": ("kAtOnce", False),
}
CHANNELS = 32  # of a head, in every detector of the package


class Loop(NamedTuple):
    """A loop of a kernel: its instructions in all and by kind, as they stand there, taken in a turn or not.

    ``threads`` are those of a block, and ``blocks`` is how many blocks fit a multiprocessor at a time; they are None
    where the launch decides on the threads. ``shared_memory`` is in bytes, without what the launch asks for in addition
    to it in CUDA C++. ``reduced`` are the bytes that a thread adds to memory in a turn at most, by the
    branches that add most, ``reduced_a_sample`` those that all lanes add for a sample of deformable attention.
    """

    kernel: str
    architecture: int
    threads: int | None
    registers: int
    shared_memory: int
    blocks: int | None
    instructions: int
    tensor: int
    exponential: int
    memory: int
    reductions: int
    shared: int
    exchange: int
    uniform: int
    float: int
    double: int
    integer: int
    control: int
    other: int
    reduced: int
    reduced_a_sample: int | None


COUNTS = Loop._fields[Loop._fields.index("tensor") : Loop._fields.index("reduced")]


def blocks_at_a_time(architecture: int, warps: int, registers: int, shared_memory: int) -> int:
    """How many blocks of a kernel fit a multiprocessor; registers are those of a thread, memory is in bytes."""
    threads, blocks, memory, of_system, memory_at_a_time = MULTIPROCESSORS[architecture]
    warps_of_quarter = REGISTERS // _rounded_up(32 * registers, REGISTERS_AT_A_TIME)
    limits = [blocks, threads // (32 * warps), QUARTERS * warps_of_quarter // warps]
    if of_block := _rounded_up(shared_memory + of_system, memory_at_a_time):
        limits.append(memory // of_block)
    return min(limits)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def loops_of(compiled: Compiled) -> list[Loop]:
    """The inner loop of every kernel, in the order of the kernels; of those of :data:`NAMED`, these."""
    kernels = sass.read(disassemble(compiled.cubin))
    return [loop for symbol, usage in compiled.usages.items() for loop in loops_of_kernel(kernels[symbol], usage)]


def loops_of_kernel(kernel: sass.Kernel, usage: Usage) -> list[Loop]:
    name = re.search(r"([^/]*?)(?:<.*)?$", usage.kernel).group(1)
    if name in NAMED:
        return [
            _loop(
                kernel, sass.longest(kernel, functions, function_at), usage._replace(kernel=f"{usage.kernel}: {label}")
            )
            for label, functions in NAMED[name].items()
        ]
    loop = _loop(kernel, sass.inner_loop(kernel, AROUND.get(name, 0)), usage)
    return [loop._replace(reduced_a_sample=reduced_a_sample(usage.kernel, loop.reduced))]


def _loop(kernel: sass.Kernel, loop: sass.Cycle | None, usage: Usage) -> Loop:
    instructions = sass.of(kernel, loop)
    kinds = sass.count_kinds(instructions)
    threads = usage.threads or kernel.threads
    return Loop(
        usage.kernel,
        usage.architecture,
        threads,
        usage.registers,
        usage.shared_memory,
        threads and blocks_at_a_time(usage.architecture, threads // 32, usage.registers, usage.shared_memory),
        len(instructions),
        *(kinds[kind] for kind in COUNTS),
        reduced=sass.reduced_in_a_turn(kernel, loop),
        reduced_a_sample=None,
    )


def reduced_a_sample(kernel: str, reduced: int) -> int | None:
    """Bytes that all lanes add for a sample, of those that one adds in a turn; None of kernels without samples.

    Heads have 32 channels, of which a lane has as many as the kernel's last template argument says.
    """
    name, arguments = re.search(r"(\w+)(?:<(.*)>)?$", kernel).groups()
    if name not in SAMPLES:
        return None
    samples, in_group = SAMPLES[name]
    lanes = max(CHANNELS // int(arguments.split(",")[-1]), constant("kMinGroup")) if in_group else 1
    return reduced * lanes // (samples if isinstance(samples, int) else constant(samples))


@cache
def constant(name: str) -> int:
    """An integer constant of csrc.

    Raises:
        ValueError: if there is none of that name.
    """
    for source in sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file()):
        if found := re.search(rf"\b{name} = (\d+)\b", source.read_text()):
            return int(found.group(1))
    raise ValueError(f"csrc has no constant {name}, which the benchmarks count by")


def function_at(frame: sass.Frame) -> str:
    """The name of the function that a line of a source is in; that of the file if none is before it."""
    definitions = _definitions(frame.file)
    return next((name for line, name in reversed(definitions) if line <= frame.line), Path(frame.file).name)


@cache
def _definitions(file: str) -> list[tuple[int, str]]:
    """Functions for the GPU in a source, by the lines that they begin at."""
    text = Path(file).read_text(errors="replace") if Path(file).is_file() else ""
    found = re.finditer(r"\b(?:__device__|__global__|HOST_DEVICE)\b[^;{}]*?\b(?!__|defined\b)(\w+)\(", text)
    return [(text.count("\n", 0, match.start()) + 1, match.group(1)) for match in found]


def disassemble(cubin: bytes) -> str:
    """What nvdisasm prints of a cubin, with source lines.

    Raises:
        FileNotFoundError: if there is no nvdisasm.
        RuntimeError: if it does not know the architecture.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([find_nvdisasm(), "-gi", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm fails: {done.stderr.strip()}")
    return done.stdout


@cache
def find_nvdisasm() -> str:
    """The nvdisasm that Triton brings along, or else the one on the path.

    Raises:
        FileNotFoundError: if there is none.
    """
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = shutil.which("nvdisasm", path=bundled) or shutil.which("nvdisasm")
    if found is None:
        raise FileNotFoundError("counting instructions needs nvdisasm, which triton and the CUDA toolkit bring along")
    return found
