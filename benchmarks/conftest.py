"""Fixtures of the benchmarks: ``comparison`` times contenders and ``memory`` measures their peak memory.

A benchmark's module has a function ``prepare`` from a case of harness/cases.py to the contenders, by name, and a check
of their results; the contender :data:`~harness.results.OURS` is this package. Results go to benchmarks/results.
"""

import tempfile
from pathlib import Path

import pytest
import torch

from groupdetr_fast import ops
from harness import places
from harness.comparison import ReplayedClock, measure_cases, report_status
from harness.interleave import Effort
from harness.memory import peak_in_new_process
from harness.results import ResultWriter

WRITER = pytest.StashKey[ResultWriter]()

clock = ReplayedClock()


def pytest_addoption(parser):
    group = parser.getgroup("groupdetr_fast")
    group.addoption("--quick", action="store_true", help="one round, small images: to see that everything works")
    group.addoption(
        "--results", type=Path, help=f"where to write csv files (default: {places.RESULTS}; a new one for --quick)"
    )


def pytest_configure(config):
    folder = config.getoption("--results")
    if folder is None:
        quick = config.getoption("--quick")
        folder = Path(tempfile.mkdtemp(prefix="groupdetr_fast-quick-")) if quick else places.RESULTS
    config.stash[WRITER] = ResultWriter(folder)


def pytest_collection_modifyitems(items):
    for item in items:
        if "comparison" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=clock))


def pytest_sessionfinish(session):
    session.config.stash[WRITER].write()


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash[WRITER].report():
        terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["backends"] = ops.backends()


@pytest.fixture(scope="session")
def measured():
    """What was timed so far: ``{(comparison, case): {contender: Timing}}``."""
    return {}


@pytest.fixture
def comparison(request, benchmark, measured):
    """A function that reports one contender of a comparison.

    The first call for a case measures all contenders of that case, round by round; later calls report what it found.
    ``together`` are cases that are measured in one run, for ratios between cases; ``x`` is the attribute of a case that
    the results are plotted against; ``seconds`` is the time to spend.
    """

    def report(name, case, contender, prepare, *, x=None, threads=None, seconds=Effort.seconds, together=None):
        if (name, case) not in measured:
            quick = request.config.getoption("--quick")
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                for each, timings in measure_cases(together or [case], prepare, seconds, quick):
                    measured[name, each] = timings
                    request.config.stash[WRITER].add_timings(name, each, getattr(each, x) if x else 0, timings)
            finally:
                torch.set_num_threads(before)
        timing = measured[name, case][contender]
        report_status(contender, timing)
        benchmark.group = f"{name} {case}"
        benchmark.extra_info["calls_per_sample"] = timing.calls
        samples = iter(timing.seconds)
        benchmark.pedantic(lambda: clock.advance(next(samples)), rounds=len(timing.seconds))

    return report


@pytest.fixture
def memory(request):
    """A function that measures one contender of a module's ``prepare``."""

    def report(name, case, contender, module, *, x):
        peak = peak_in_new_process(module, str(case), contender, small=request.config.getoption("--quick"))
        request.config.stash[WRITER].add_memory(name, case, getattr(case, x), contender, peak)
        report_status(contender, peak)

    return report
