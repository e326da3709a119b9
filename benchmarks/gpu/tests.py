"""Stage ``tests``: the tests of the suite that need a GPU, several at a time.

One row for each test that fails and each file that cannot be imported, and one with the counts. JUnit's file of all
tests is beside the rows, if pytest came to its end.
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.places import ROOT, python_path

from .pytest_stream import OUT_OF_TIME
from .recorder import Recorder

WORKERS = 14  # each has a context on the GPU, of about 500 MB
RESERVE = 15.0  # seconds for tests that have started when the time is over
REHEARSED = ("-m", "not slow", "tests/test_groups.py", "tests/ops/test_registration.py")


def run(recorder: Recorder) -> None:
    files = list(filter(recorder.wants, gpu_test_files()))
    if recorder.rehearsal:
        run_tests(recorder, REHEARSED)
    elif files:
        run_tests(recorder, ("-m", "gpu", *files))
    else:
        recorder.add("tests", status="missing", note=f"no file of tests for a GPU matches {recorder.only.pattern!r}")


def gpu_test_files() -> list[str]:
    """Files that may have tests for a GPU; the others take long to import, or need what is not installed."""
    return sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if _may_need_gpu(file))


def _may_need_gpu(file: Path) -> bool:
    """Whether anything in a file takes a ``device``, which may be the fixture, or is marked ``gpu``."""
    return any(
        (isinstance(node, ast.arg) and node.arg == "device") or (isinstance(node, ast.Attribute) and node.attr == "gpu")
        for node in ast.walk(ast.parse(file.read_text()))
    )


def run_tests(recorder: Recorder, arguments: Sequence[str]) -> None:
    """Run pytest in a process of its own and add rows while it runs."""
    counts = Counter()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        stream, log = Path(temporary, "stream.jsonl"), Path(temporary, "log.txt")
        stream.touch()
        with log.open("w") as output:
            process = subprocess.Popen(
                _command(recorder.folder, arguments),
                cwd=ROOT,
                env=_environment(stream, time.time() + recorder.seconds_left - RESERVE),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it can be ended together with its workers
            )
        with _ended_with_block(process), stream.open() as results:
            running = True
            while running:
                running = process.poll() is None and recorder.seconds_left > 0
                for line in _complete_lines(results):
                    _add(recorder, json.loads(line), counts)
                time.sleep(0.2 if running else 0)
        note = {} if process.returncode in (0, 1) else _note(process.returncode, log.read_text())
    recorder.add(
        "tests",
        # 0: all passed; 1: some failed, which have rows of their own; 5: nothing was selected; -9: no time was left.
        status="ok" if process.returncode in (0, 1, -signal.SIGKILL) else "wrong",
        seconds=round(time.monotonic() - start, 1),
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped", "out_of_time", "not_collected")},
        **note,
    )


def _command(folder: Path, arguments: Sequence[str]) -> list[str]:
    parallel = []
    if importlib.util.find_spec("xdist"):
        parallel = ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) - 1)))]
        # Tests that compile many kernels stand side by side: not all of them to the same worker.
        parallel += ["--maxschedchunk", "1"] if _version("pytest-xdist") >= (3, 2) else []
    timeout = ["--timeout=60"] if importlib.util.find_spec("pytest_timeout") else []
    options = ["-q", "-p", "no:cacheprovider", "-p", "gpu.pytest_stream", "--continue-on-collection-errors"]
    junit = f"--junitxml={folder.resolve() / 'tests.xml'}"
    return [sys.executable, "-m", "pytest", *options, junit, *parallel, *timeout, *arguments]


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, re.findall(r"\d+", version(package))[:2]))
    except PackageNotFoundError:
        return ()


def _environment(stream: Path, end: float) -> dict[str, str]:
    # What pytest is to run is no worker, even if this process is one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {
        # The workers compile the same kernels; the first one to need a kernel shares it with the others.
        "TRITON_CACHE_DIR": str(stream.parent / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(stream.parent / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",  # of each worker
        **inherited,
        "GROUPDETR_FAST_TESTS_STREAM": str(stream),
        "GROUPDETR_FAST_TESTS_END": str(end),
        "PYTHONPATH": python_path(ROOT, ROOT / "benchmarks"),
    }


@contextlib.contextmanager
def _ended_with_block(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _complete_lines(file) -> Iterator[str]:
    """The lines that were added to a file since it was last read."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield line


def _add(recorder: Recorder, result: dict[str, Any], counts: Counter) -> None:
    outcome, message = result["outcome"], result["message"].strip()
    if result["kind"] == "collection":
        counts["not_collected"] += 1
        absent = re.search(r"ModuleNotFoundError: (?:No module named '([\w.]+)'|import of ([\w.]+) halted)", message)
        if absent:
            name = absent.group(1) or absent.group(2)
            recorder.add("collection", test=result["test"], status="missing", note=f"{name} is not installed")
        else:
            recorder.add("collection", test=result["test"], status="wrong", note=message[-400:])
    elif outcome == "skipped" and OUT_OF_TIME in message:
        counts["out_of_time"] += 1
    else:
        counts[outcome] += 1
        if outcome == "failed":
            recorder.add("test", test=result["test"], status="wrong", seconds=result["seconds"], **_failure(message))


def _failure(message: str) -> dict[str, Any]:
    """The first line of a message, and, if it is of ``assert_matches_reference``, how far the error was off."""
    found: dict[str, Any] = {"note": message.partition("\n")[0][:300]}
    numbers = re.search(r"largest error (\S+), allowed ([^\s,]+)", message)
    if numbers:
        error, allowed = map(float, numbers.groups())
        found["error_over_allowed"] = round(error / allowed, 3) if allowed else None
    return found


def _note(returncode: int, log: str) -> dict[str, str]:
    if returncode == -signal.SIGKILL:
        return {"note": "ended where the time was over"}
    return {"note": f"pytest ended with status {returncode}: {' '.join(log.split())[-400:]}"}
