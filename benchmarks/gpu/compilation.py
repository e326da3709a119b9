"""Compiles the GPU kernels of the package without a GPU: what each takes, and its machine code.

Triton kernels are compiled in every configuration that the op lists (``triton_cases.py``), CUDA sources as setup.py
compiles them.
"""

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from groupdetr_fast.ops._triton import CompileCase
from harness.places import ROOT

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


class Compiled(NamedTuple):
    """What a compiler made of one Triton configuration, or of one CUDA source: kernels by symbol, and their cubin."""

    usages: dict[str, Usage]
    cubin: bytes


def triton_cases(architecture: int | None = None) -> list[CompileCase]:
    """The configurations of all Triton kernels, or those that serve an architecture.

    Raises:
        ImportError: if Triton is not installed.
    """
    files = sorted(ROOT.glob("groupdetr_fast/ops/*/triton_cases.py"))
    modules = (importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in files)
    cases = [case for module in modules for case in module.compile_cases()]
    return [case for case in cases if architecture is None or case.oldest <= architecture <= case.newest]


def compile_triton(case: CompileCase, architecture: int) -> Compiled:
    """Compile one configuration, past Triton's cache."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from groupdetr_fast.ops._triton_launch import OPTIONS

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(case.kernel, case.signature, case.constexprs, case.attributes())
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (usage,) = _usages(log.getvalue(), architecture)
    # The assembler does not see the shared memory that Triton asks for at the launch.
    whole = usage._replace(kernel=case.name, threads=32 * case.num_warps, shared_memory=compiled.metadata.shared)
    return Compiled({usage.kernel: whole}, compiled.asm["cubin"])


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


def compile_cuda(source: Path, architecture: int) -> Compiled:
    """Compile all kernels of a source, which is in csrc/cuda of some checkout.

    Their code knows the lines that it comes from, which changes nothing else.

    Raises:
        FileNotFoundError: if there is no nvcc.
        subprocess.CalledProcessError: if it does not compile; the compiler's message is in ``stderr``.
    """
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("compiling CUDA kernels needs nvcc (set CUDA_HOME)")
    includes = [f"-I{folder}" for folder in (source.parents[1], *include_paths())]
    options = ["-O3", "-std=c++20", *COMMON_NVCC_FLAGS, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        target = [f"-arch=sm_{architecture}", "-cubin", "-lineinfo", "-Xptxas", "-v", "-o", str(cubin)]
        command = [nvcc, *options, *includes, *target, str(source)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        usages = {
            usage.kernel: usage._replace(kernel=f"{source.stem}/{_plain_name(usage.kernel)}")
            for usage in _usages(log, architecture)
        }
        return Compiled(dict(sorted(usages.items(), key=lambda found: found[1].kernel)), cubin.read_bytes())


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


def _plain_name(symbol: str) -> str:
    """``solve<bfloat16, 32, true>`` of a mangled name; the name itself without c++filt.

    The namespace of a file has a number that changes from build to build. Half types are named as torch names them.
    """
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    plain = re.search(r"(\w+(?:<[^(]*>)?)\(", name).group(1)
    return plain.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")


class Task(NamedTuple):
    """One Triton configuration, or one CUDA source, for one architecture."""

    architecture: int
    case: str | None = None
    source: Path | None = None

    def compile(self) -> Compiled:
        if self.source is not None:
            return compile_cuda(self.source, self.architecture)
        (case,) = (case for case in triton_cases() if case.name == self.case)
        return compile_triton(case, self.architecture)


def tasks(only: str, architectures: Iterable[int]) -> list[Task]:
    """What there is to compile, of kernels in whose name a regular expression is found.

    CUDA sources, all of whose kernels are compiled at once, are compiled for what nvcc knows.
    """
    nvcc = find_nvcc()
    sources = [source for source in cuda_sources() if _has_kernel(source, only)]
    found = []
    for architecture in architectures:
        cases = triton_cases(architecture)
        found += [Task(architecture, case=case.name) for case in cases if re.search(only, case.name)]
        if nvcc is None or knows(nvcc, architecture):
            found += [Task(architecture, source=source) for source in sources]
    return found


def _has_kernel(source: Path, only: str) -> bool:
    """Whether a source has a kernel in whose name the expression may be found, template arguments left out."""
    names = [f"{source.stem}/{kernel}" for kernel in cuda_kernels(source)]
    return any(re.search(only.split("<")[0], name) for name in names)


def cuda_kernels(source: Path) -> list[str]:
    """The names of the kernels of a source and of what it includes from its folder."""
    text = source.read_text()
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(", text)
    headers = re.findall(r'#include "(\w+\.cuh)"', text)
    return list(dict.fromkeys(names + [name for header in headers for name in cuda_kernels(source.parent / header)]))
