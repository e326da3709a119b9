"""A plugin of pytest for the stage ``tests``: says at once what became of each test, and starts none after the end.

    python -m pytest -p gpu.pytest_stream

``GROUPDETR_FAST_TESTS_STREAM`` names the file of results, one JSON object a line; ``GROUPDETR_FAST_TESTS_END`` is a
time as of ``time.time()``.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

OUT_OF_TIME = "no time left"


def pytest_runtest_setup():
    if time.time() > float(os.environ["GROUPDETR_FAST_TESTS_END"]):
        pytest.skip(OUT_OF_TIME)
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # After an illegal access nothing works on the GPU in this process. A new worker takes over; only the test
            # that was about to start is reported as a crash.
            os._exit(1)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _write(report, "test")


def pytest_collectreport(report):
    if report.failed:
        _write(report, "collection")


def _write(report, kind: str) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that gathers the reports of all workers writes them
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.skipped:
        message = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    else:
        message = crash.message if crash else str(report.longrepr)
    row = {
        "kind": kind,
        "test": report.nodeid,
        "outcome": report.outcome,
        "message": message if report.outcome != "passed" else "",
        "seconds": round(getattr(report, "duration", 0.0), 2),
    }
    with Path(os.environ["GROUPDETR_FAST_TESTS_STREAM"]).open("a") as file:
        file.write(json.dumps(row) + "\n")
