"""Comparisons under pytest: contenders timed together, and what becomes of one that was not timed."""

import pytest
import torch

from .interleave import QUICK, Effort, measure
from .results import OURS

__all__ = ["ReplayedClock", "measure_cases", "report_status"]


class ReplayedClock:
    """Time that stands still unless told otherwise. Through it pytest-benchmark gets what was measured before."""

    def __init__(self):
        self._now = 0.0

    def __call__(self):
        return self._now

    def advance(self, seconds):
        self._now += seconds


def measure_cases(cases, prepare, seconds, quick):
    torch.manual_seed(0)
    prepared = {case: prepare(case.small() if quick and hasattr(case, "small") else case) for case in cases}
    contenders = {(case, name): run for case, (runs, _) in prepared.items() for name, run in runs.items()}
    effort = QUICK if quick else Effort(seconds)
    timings = measure(contenders, lambda key, result: prepared[key[0]][1](result), effort)
    for case, (runs, _) in prepared.items():
        yield case, {name: timings[case, name] for name in runs}


def report_status(contender, found):
    if found.status != "ok":
        (pytest.fail if contender == OURS else pytest.skip)(f"{contender} is {found.status}: {found.note}")
