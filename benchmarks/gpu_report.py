"""One report of everything that needs a GPU: tests, kernels against references, times, host synchronisations, memory.

    python benchmarks/gpu_report.py

Writes report.md and report.json to benchmarks/results/gpu/<name of the GPU>. Fails if a test fails or a kernel differs
from its reference.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import gpu_contenders
import torch
from interleave import Effort, in_one_line, quartiles
from on_device import count_host_syncs, peak_bytes, replay, seconds_per_call
from results import OURS
from torch import Tensor

import groupdetr_fast as gd
from groupdetr_fast.testing import assert_matches_reference

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "gpu"
DTYPES = (torch.float32, torch.bfloat16)
GPU_TESTS = ["tests/ops", "tests/layers", "tests/models", "tests/training", "-k", "cuda"]
EFFORT = Effort(seconds=1.0, rounds=(5, 50))
# Largest difference between contenders, of the largest value: their sums have different orders.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

Row = dict[str, Any]


def environment(device: torch.device) -> Row:
    found = {"device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "CUDA of torch": torch.version.cuda,
        }
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    kernels = ", ".join(f"{op}: {kinds[device.type]}" for op, kinds in gd.ops.backends().items())
    return {**found, "torch": torch.__version__, "groupdetr_fast": f"{gd.__version__} ({commit})", "kernels": kernels}


def run_tests(arguments: list[str]) -> Row:
    """Run pytest; the summary is its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = process.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = lines[-1] if lines else process.stderr[-1000:]
    return {
        "command": " ".join(arguments),
        "status": attempted(process.returncode == 0),
        "summary": summary,
        "failed": failed,
    }


def attempted(good: bool) -> str:
    return "ok" if good else "wrong"


def compare_kernels(kernels: Iterable[gpu_contenders.Kernel], dtype: torch.dtype) -> list[Row]:
    """Each kernel's errors against its reference's, by the rule of the tests."""
    rows = []
    for kernel in kernels:
        status, note = "ok", ""
        try:
            for index, result in enumerate(as_list(kernel.run(*kernel.inputs))):
                assert_matches_reference(
                    result, lambda *inputs, i=index, k=kernel: as_list(k.reference(*inputs))[i], *kernel.inputs
                )
        except torch.OutOfMemoryError as error:
            status, note = "missing", in_one_line(error)
        except (AssertionError, RuntimeError) as error:
            status, note = "wrong", in_one_line(error)
        rows.append(
            {"op": kernel.name, "case": label(kernel.case), "dtype": name_of(dtype), "status": status, "note": note}
        )
    return rows


def time_works(
    works: Iterable[gpu_contenders.Work], dtype: torch.dtype, device: torch.device, effort: Effort
) -> list[Row]:
    """Check that the contenders agree with this package, then time them."""
    rows = []
    for work in works:
        expected = ours = None
        for contender, run in work.runs.items():
            row = {"work": work.name, "case": label(work.case), "dtype": name_of(dtype), "contender": contender}
            rows.append(row)
            try:
                outcome = work.outcome(run())
                expected = expected or outcome
                row["difference"] = largest_difference(outcome, expected)
                row["status"] = attempted(row["difference"] <= AGREEMENT[dtype])
                if row["status"] == "ok":
                    seconds = seconds_per_call(run, device, effort)
                    row["rounds"] = len(seconds)
                    row["seconds_q1"], row["seconds"], row["seconds_q3"] = quartiles(seconds)
                    ours = ours or row["seconds"]
                    row["ratio"] = row["seconds"] / ours
            except (RuntimeError, TypeError, ImportError) as error:  # also out of memory; a peer may lack a dtype
                row["status"], row["note"] = "wrong" if contender == OURS else "missing", in_one_line(error)
            if ours is None:
                break  # nothing to compare the others with
    return rows


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of the largest value of each tensor."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    )


def count_syncs(case: cases.Matching, device: torch.device) -> list[Row]:
    """Of the criterion, forward and backward; None where they cannot be counted."""
    work = gpu_contenders.criterion_work(case, device, torch.float32)
    return [
        {"case": label(case), "contender": contender, "host synchronisations": count_host_syncs(run, device)}
        for contender, run in work.runs.items()
    ]


def capture_graphs(case: cases.Matching, device: torch.device) -> list[Row]:
    """Whether the assignment and the criterion's forward and backward pass can be replayed, with the same result."""
    assignment = gpu_contenders.assignment_work(case, device).runs[OURS]
    criterion = gpu_contenders.criterion_work(case, device, torch.float32).runs[OURS]
    works = {"linear_assignment": assignment, "criterion": lambda: criterion()[1][0].clone()}
    rows = []
    for name, run in works.items():
        row = {"work": name, "case": label(case), "status": "ok", "note": ""}
        rows.append(row)
        try:
            replayed = replay(run, device)
        except RuntimeError as error:
            row["status"], row["note"] = "missing", in_one_line(error)
            continue
        row["difference"] = None if replayed is None else largest_difference([replayed], [run()])
        row["status"] = attempted(replayed is None or row["difference"] <= AGREEMENT[torch.float32])
    return rows


def measure_memory(
    attention: cases.Attention, matching: cases.Matching, num_groups: Iterable[int], device: torch.device
) -> list[Row]:
    """Peak memory of decoder self-attention and of the criterion, forward and backward, for each number of groups."""
    rows = []
    for groups in num_groups:
        for work in (
            gpu_contenders.attention_work(replace(attention, num_groups=groups), device, torch.float32),
            gpu_contenders.criterion_work(replace(matching, num_groups=groups), device, torch.float32),
        ):
            for contender, run in work.runs.items():
                row = {"work": work.name, "case": label(work.case), "groups": groups, "contender": contender}
                rows.append(row)
                try:
                    row["bytes"] = peak_bytes(run, device)
                except torch.OutOfMemoryError as error:
                    row["note"] = in_one_line(error)
    return rows


def fill(
    report: dict[str, Any],
    device: torch.device,
    sizes: list[tuple[cases.Attention, cases.Deformable, cases.Matching]],
    num_groups: Iterable[int],
    tests: list[str],
    effort: Effort,
) -> None:
    """Measure everything; what is done stands in ``report`` also if a later step fails.

    Args:
        report: the result, by section.
        device: where.
        sizes: of what is timed; kernels are compared with references, which need much memory, at the first one.
        num_groups: for memory.
        tests: arguments of pytest.
        effort: how long to time.
    """
    torch.manual_seed(0)
    attention, deformable, matching = sizes[0]
    single = [replace(case, batch=1) for case in (attention, deformable, matching)]
    report.update(environment=environment(device), tests=run_tests(tests), kernels=[], times=[])
    for dtype in DTYPES:
        report["kernels"] += compare_kernels(gpu_contenders.kernels(*single, device, dtype), dtype)
    for size in sizes:
        for dtype in DTYPES:
            report["times"] += time_works(gpu_contenders.works(*size, device, dtype), dtype, device, effort)
    report["host synchronisations"] = count_syncs(matching, device)
    report["CUDA graphs"] = capture_graphs(matching, device)
    report["memory"] = measure_memory(attention, matching, num_groups, device)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables, in the order in which it was made."""
    tests = report["tests"]
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in report["environment"].items())]
    lines += ["", "## Tests", "", f"`pytest {tests['command']}`: {tests['summary']}", *tests["failed"]]
    titles = {
        "kernels": "Kernels against references",
        "times": "Times (forward and backward, where there is one)",
        "host synchronisations": "Host synchronisations of the criterion, forward and backward",
        "CUDA graphs": "CUDA graphs",
        "memory": "Peak memory, forward and backward",
    }
    for section, title in titles.items():
        rows = [readable(row) for row in report.get(section, [])]
        lines += ["", f"## {title}", "", *(markdown_table(rows) if rows else ["Not measured."])]
    return "\n".join([*lines, ""])


def readable(row: Row) -> Row:
    """Numbers in the units of the tables."""
    cells = {}
    for name, value in row.items():
        if name == "seconds":
            cells["ms"] = f"{1e3 * value:.3f} ({1e3 * row['seconds_q1']:.3f} to {1e3 * row['seconds_q3']:.3f})"
        elif name == "bytes":
            cells["MiB"] = "" if value is None else f"{value / 2**20:.1f}"
        elif name == "difference":
            cells[name] = "" if value is None else f"{value:.1e}"
        elif name == "ratio":
            cells[name] = f"{value:.2f}"
        elif not name.startswith("seconds_"):
            cells[name] = "" if value is None else str(value)
    return cells


def markdown_table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ([row.get(column, "").replace("|", "\\|") for column in columns] for row in rows)
    cells = [columns, ["---"] * len(columns), *lines]
    return [f"| {' | '.join(line)} |" for line in cells]


def wrong(report: dict[str, Any]) -> list[Row]:
    """What makes the report a failure."""
    rows = [report["tests"], *(row for section in ("kernels", "times", "CUDA graphs") for row in report[section])]
    return [row for row in rows if row["status"] == "wrong"]


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(to_markdown(report))


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def label(case: Any) -> str:
    return f"{case}, batch {case.batch}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the GPUs' folders")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu-report needs a GPU, but torch finds none (torch.cuda.is_available() is False)")
    device = torch.device("cuda")
    folder = arguments.results / re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    sizes = list(zip(cases.GPU_ATTENTION, cases.GPU_DEFORMABLE, cases.GPU_MATCHING, strict=True))
    report = {}
    try:
        fill(report, device, sizes, (1, 3, 5, 11), GPU_TESTS, EFFORT)
    finally:
        write(report, folder)
    print(to_markdown(report), f"{folder}/report.md", sep="\n")
    for row in wrong(report):
        print("WRONG:", row, file=sys.stderr)
    sys.exit(1 if wrong(report) else 0)


if __name__ == "__main__":
    main()
