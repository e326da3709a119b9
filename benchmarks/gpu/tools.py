"""NVIDIA's sanitizer and profiler: how they are run, and what they say."""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.places import ROOT, python_path

__all__ = [
    "METRICS",
    "Program",
    "every_op",
    "find",
    "profiler_command",
    "profiles",
    "reason",
    "sanitizer_command",
    "summary",
]

METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "l1_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "smsp__inst_executed.sum": "instructions",
    "sm__inst_executed_pipe_xu.sum": "special_function_instructions",
    "dram__bytes.sum": "dram_bytes",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "shared_memory_conflicts",
    "launch__registers_per_thread": "registers",
}


def find(name: str) -> str | None:
    """A tool on the path or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", os.defpath), *(str(Path(home) / "bin") for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


def every_op(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpu.every_op", *arguments]


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    # torch asks for things that may fail, and handles the errors.
    api_errors = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [sanitizer, "--tool", tool, *api_errors, "--print-limit", "5", *every_op("small")]


def profiler_command(profiler: str, metrics: Sequence[str] = ()) -> list[str]:
    """Without metrics, those of the profiler's own basic set. The card's clocks are left alone."""
    chosen = ["--metrics", ",".join(metrics)] if metrics else ["--set", "basic"]
    kernels = [
        "--kernel-name-base",
        "function",
        "--kernel-name",
        "regex:grouped_attention|cross_attention|deform_(forward|backward|count|scan|scatter)",
    ]
    options = ["--clock-control", "none", "--csv", "--print-units", "base", "--launch-count", "20"]
    return [profiler, *options, *kernels, *chosen, *every_op("large")]


class Program:
    """A program that runs in the background. What it prints goes to a file, so that it can be read whenever it ends."""

    def __init__(self, command: Sequence[str], **environment: str):
        environment = {**os.environ, "PYTHONPATH": python_path(ROOT, ROOT / "benchmarks"), **environment}
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=ROOT / "benchmarks",
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended together with its children
        )

    def finish(self, seconds: float) -> tuple[str, int | None]:
        """What it printed, and its exit status: None if it had not ended after these seconds and was killed."""
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(max(seconds, 0))
        self.close()
        self._output.seek(0)
        return self._output.read(), status

    def close(self) -> None:
        """Kill it if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def summary(text: str) -> tuple[str, int] | None:
    """The sanitizer's summary and its number of errors and warnings; None if it printed none."""
    found = re.search(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    if found is None:
        return None
    numbers = re.findall(r"(\d+) (?:errors?|hazards?|warnings?)", found.group(2))
    return found.group(2).strip(), sum(map(int, numbers))


def profiles(text: str) -> list[dict[str, str | float]]:
    """The metrics of every launch in the profiler's CSV, by the names of ``METRICS`` or, beyond them, by its own."""
    lines = text.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith('"ID"')]
    launches: dict[str, dict[str, str | float]] = {}
    for row in csv.DictReader(lines[starts[0] :]) if starts else ():
        if not row.get("Metric Name") or row.get("Metric Value") is None:
            continue
        kernel = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", row["Kernel Name"])
        launch = launches.setdefault(row["ID"], {"kernel": re.split(r"[<(]", kernel)[0].split()[-1]})
        name = METRICS.get(row["Metric Name"], row["Metric Name"])
        try:
            launch[name] = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            launch[name] = row["Metric Value"]
    return list(launches.values())


def reason(text: str, status: int | None) -> str:
    """Why a tool gave nothing: its own words for it, or else the end of what was printed."""
    errors = [line for line in text.splitlines() if "==ERROR==" in line or "Error:" in line]
    said = " ".join(" ".join(errors[-2:] or [text[-300:]]).split())
    return f"{'not done in time' if status is None else f'status {status}'}: {said}"[:400]
