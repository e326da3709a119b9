"""Compiles every GPU kernel of the package without a GPU, and tells what it takes and what its inner loop consists of.

    python benchmarks compile_gpu
    python benchmarks compile_gpu --only sigmoid_focal_loss --architectures 90 --jobs 4

Two tables are printed and kept: registers, shared memory and spills of every kernel, and instructions of its inner loop
by kind, as inner_loops counts them. Rows of kernels that are not compiled this time stay in the files. The command
fails if a kernel spills registers to memory or does not fit an architecture.
"""

import argparse
import csv
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from harness.places import RESULTS

from .compilation import SHARED_MEMORY, Task, Usage, cuda_sources, find_nvcc, tasks, triton_cases
from .loops import Loop, find_nvdisasm, loops_of

USAGES = RESULTS / "compile_gpu.csv"
LOOPS = RESULTS / "inner_loops.csv"


class Measured(NamedTuple):
    """What was found out about the kernels of one task, which were compiled once."""

    usages: list[Usage]
    loops: list[Loop]


def measure(task: Task) -> Measured:
    compiled = task.compile()
    return Measured(list(compiled.usages.values()), loops_of(compiled))


def measure_all(work: Sequence[Task], jobs: int) -> Iterator[Measured]:
    """In the order of the tasks, which processes of their own work on."""
    # spawn: torch has started threads by now, and a fork might find their locks taken.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done, measured in enumerate(pool.map(measure, work), start=1):
            yield measured
            if done % 50 == 0:
                print(f"{done} of {len(work)} compiled", flush=True)


def add_options(parser: argparse.ArgumentParser, architectures: Sequence[int]) -> None:
    parser.add_argument(
        "--only", type=_expression, default="", help="kernels in whose name this regular expression is found"
    )
    parser.add_argument("--architectures", type=int, nargs="+", default=architectures, choices=SHARED_MEMORY)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from None
    return text


def find_work(only: str, architectures: Sequence[int]) -> list[Task]:
    """The tasks, if there are any and what they need is installed; else the command ends here."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("compiling the Triton kernels needs triton (pip install triton)")
    if find_nvcc() is None:
        raise SystemExit("compiling the CUDA kernels needs nvcc (set CUDA_HOME)")
    try:
        find_nvdisasm()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    work = tasks(only, architectures)
    if not work:
        raise SystemExit(f"--only: no kernel has {only} in its name")
    return work


def update(path: Path, fields: Sequence[str], rows: Sequence[Sequence[Any]], work: Iterable[Task]) -> None:
    """Write rows, which begin with kernel and architecture, into a table.

    Rows of kernels that were not compiled stay there, unless there are no such kernels any more.
    """
    cases = {case.name for case in triton_cases()}
    compiled = {(task.source.stem, task.architecture) for task in work if task.source is not None}
    sources = {source.stem for source in cuda_sources()}

    def stays(row: dict[str, str]) -> bool:
        kernel, architecture = row["kernel"], int(row["architecture"])
        if kernel in cases:
            return (kernel, architecture) not in new
        stem = kernel.split("/")[0]
        return stem in sources and (stem, architecture) not in compiled

    new = {(row[0], row[1]) for row in rows}
    kept = [row for row in read(path) if stays(row)] if path.exists() else []
    everything = [*([row.get(field, "") for field in fields] for row in kept), *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([fields, *sorted(everything, key=lambda row: (int(row[1]), row[0]))])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns side by side; None is left empty."""
    texts = [fields, *([("" if value is None else str(value)) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(
            [text[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(text[1:], widths[1:], strict=True))]
        )
        for text in texts
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, list(SHARED_MEMORY))
    parser.add_argument("--csv", type=Path, default=USAGES, help="where the table of registers and spills goes")
    parser.add_argument("--loops-csv", type=Path, default=LOOPS, help="where the table of inner loops goes")
    options = parser.parse_args()
    work = find_work(options.only, options.architectures)
    usages: list[Usage] = []
    loops: list[Loop] = []
    for measured in measure_all(work, options.jobs):
        usages += measured.usages
        loops += measured.loops
    update(options.csv, Usage._fields, usages, work)
    update(options.loops_csv, Loop._fields, loops, work)
    print(table(Usage._fields, usages), table(Loop._fields, loops), sep="\n\n")
    problems = [problem for usage in usages for problem in usage.problems()]
    files = f"{options.csv} and {options.loops_csv}"
    print(f"\n{len(usages)} kernels compiled, {len(problems)} problems; {files}", *problems, sep="\n")
    sys.exit(1 if problems else 0)
