"""Compiles every GPU kernel of the package without a GPU, and tells its registers, shared memory and spills.

    python benchmarks compile_gpu
    python benchmarks compile_gpu --only sigmoid_focal_loss --architectures 90 --jobs 4

Triton kernels are compiled in every configuration that the op lists (``triton_cases.py``), CUDA sources as setup.py
compiles them. The command fails if a kernel spills registers to memory or does not fit an architecture.
"""

import argparse
import contextlib
import csv
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from groupdetr_fast.ops._triton import CompileCase
from harness.places import RESULTS, ROOT

TABLE = RESULTS / "compile_gpu.csv"

# Shared memory that a block may have, in bytes, by architecture (CUDA programming guide, technical specifications per
# compute capability): T4, A100, H100, B200, RTX 50.
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 64 << 10  # of a multiprocessor, in all of them
BLOCKS = 2  # that should fit a multiprocessor, so that one computes while another one waits for memory


class Usage(NamedTuple):
    """What a kernel takes on an architecture. Sizes are bytes; ``threads`` is None where the launch decides."""

    kernel: str
    architecture: int
    threads: int | None
    registers: int
    shared_memory: int
    stack: int
    spills: int

    def problems(self) -> list[str]:
        """What is wrong with it, in sentences."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills {self.spills} bytes and has a stack of {self.stack} bytes")
        if self.shared_memory > SHARED_MEMORY[self.architecture]:
            found.append(f"needs {self.shared_memory} bytes of shared memory of {SHARED_MEMORY[self.architecture]}")
        if self.threads is not None and BLOCKS * self.threads * self.registers > REGISTERS:
            found.append(f"has {self.registers} registers in {self.threads} threads: {BLOCKS} blocks do not fit")
        return [f"{self.kernel} for sm_{self.architecture} {problem}" for problem in found]


def triton_cases(architecture: int | None = None) -> list[CompileCase]:
    """The configurations of all Triton kernels, or those that serve an architecture.

    Raises:
        ImportError: if Triton is not installed.
    """
    files = sorted(ROOT.glob("groupdetr_fast/ops/*/triton_cases.py"))
    modules = (importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in files)
    cases = [case for module in modules for case in module.compile_cases()]
    return [case for case in cases if architecture is None or case.oldest <= architecture <= case.newest]


def compile_triton(case: CompileCase, architecture: int) -> Usage:
    """Compile one configuration, past Triton's cache."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(case.kernel, case.signature, case.constexprs, case.attributes())
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (usage,) = _usages(log.getvalue(), architecture)
    # The assembler does not see the shared memory that Triton asks for at the launch.
    return usage._replace(kernel=case.name, threads=32 * case.num_warps, shared_memory=compiled.metadata.shared)


def cuda_sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/cuda/*.cu"))


def find_nvcc() -> str | None:
    """The nvcc of ``CUDA_HOME``, or else the one on the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def knows(nvcc: str, architecture: int) -> bool:
    """Whether an nvcc compiles for an architecture; that of CUDA 12.4 does not for sm_120."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return f"compute_{architecture}" in known.split()


def compile_cuda(source: Path, architecture: int) -> list[Usage]:
    """Compile all kernels of a source.

    Raises:
        FileNotFoundError: if there is no nvcc.
        subprocess.CalledProcessError: if it does not compile; the compiler's message is in ``stderr``.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = make_cubin(source, architecture, Path(folder, "kernels.cubin"))
    return sorted(
        usage._replace(kernel=f"{source.stem}/{plain_name(usage.kernel)}") for usage in _usages(log, architecture)
    )


def make_cubin(source: Path, architecture: int, target: Path) -> str:
    """Compile a source of a folder ``csrc/cuda`` as :func:`compile_cuda` does; what the compiler says of it."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("compiling CUDA kernels needs nvcc (set CUDA_HOME)")
    includes = [f"-I{folder}" for folder in (source.parents[1], *include_paths())]
    options = ["-O3", "-std=c++20", *COMMON_NVCC_FLAGS, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    output = [f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-o", str(target)]
    command = [nvcc, *options, *includes, *output, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _usages(log: str, architecture: int) -> Iterator[Usage]:
    """What ptxas -v says of each kernel."""
    for entry in log.split("Compiling entry function ")[1:]:
        stack, stores, loads = (
            sum(map(int, numbers))
            for numbers in zip(
                *re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry),
                strict=True,
            )
        )
        shared = re.search(r"(\d+) bytes smem", entry)
        yield Usage(
            kernel=entry.split("'")[1],
            architecture=architecture,
            threads=None,
            registers=int(re.search(r"Used (\d+) registers", entry).group(1)),
            shared_memory=int(shared.group(1)) if shared else 0,
            stack=stack,
            spills=stores + loads,
        )


def plain_name(symbol: str) -> str:
    """``solve<float, 32, true>`` of a mangled name; the name itself without c++filt.

    The namespace of a file has a number that changes from build to build.
    """
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.search(r"(\w+(?:<[^(]*>)?)\(", name).group(1)


class Task(NamedTuple):
    """One Triton configuration, or one CUDA source, for one architecture."""

    architecture: int
    case: str | None = None
    source: Path | None = None

    def compile(self) -> list[Usage]:
        if self.source is not None:
            return compile_cuda(self.source, self.architecture)
        (case,) = (case for case in triton_cases() if case.name == self.case)
        return [compile_triton(case, self.architecture)]


def tasks(only: str, architectures: Iterable[int]) -> list[Task]:
    """What there is to compile, of kernels whose name has ``only`` in it; CUDA sources for what nvcc knows."""
    nvcc = find_nvcc()
    sources = [source for source in cuda_sources() if only in source.stem]
    found = []
    for architecture in architectures:
        found += [Task(architecture, case=case.name) for case in triton_cases(architecture) if only in case.name]
        if nvcc is None or knows(nvcc, architecture):
            found += [Task(architecture, source=source) for source in sources]
    return found


def write(usages: Sequence[Usage], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Usage._fields)
        writer.writerows(usages)


def table(usages: Iterable[Usage]) -> str:
    rows = [Usage._fields, *([("" if value is None else str(value)) for value in usage] for usage in usages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only kernels whose name has this text in it")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(SHARED_MEMORY), choices=SHARED_MEMORY)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--csv", type=Path, default=TABLE, help="where the table goes")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("compiling the Triton kernels needs triton (pip install triton)")
    if find_nvcc() is None:
        raise SystemExit("compiling the CUDA kernels needs nvcc (set CUDA_HOME)")
    work = tasks(arguments.only, arguments.architectures)
    usages = []
    # spawn: torch has started threads by now, and a fork might find their locks taken.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for done, found in enumerate(pool.map(Task.compile, work), start=1):
            usages += found
            if done % 50 == 0:
                print(f"{done} of {len(work)} compiled", flush=True)
    write(usages, arguments.csv)
    print(table(usages))
    problems = [problem for usage in usages for problem in usage.problems()]
    print(f"\n{len(usages)} kernels compiled, {len(problems)} problems; {arguments.csv}", *problems, sep="\n")
    sys.exit(1 if problems else 0)
