"""What the benchmarks do before and while they take times."""

import numpy as np
import pytest

from harness import interleave
from harness.interleave import QUICK, Effort, in_one_line, measure, quartiles

THREE_ROUNDS = Effort(seconds=0, rounds=(3, 3), sample=0)


def accept(key, result):
    if result != "right":
        raise AssertionError(f"{key} says {result}")


def test_wrong_and_missing_contenders_are_not_timed():
    calls = dict.fromkeys("abcd", 0)

    def contender(name, result):
        def run():
            calls[name] += 1
            if isinstance(result, Exception):
                raise result
            return result

        return run

    results = {"a": "right", "b": "a lie", "c": ImportError("no module c"), "d": NotImplementedError("not on CPUs")}
    timings = measure({name: contender(name, result) for name, result in results.items()}, accept, THREE_ROUNDS)
    assert {name: timing.status for name, timing in timings.items()} == {
        "a": "ok",
        "b": "wrong",
        "c": "missing",
        "d": "missing",
    }
    assert timings["b"].note == "b says a lie"
    assert timings["c"].note == "no module c"
    assert [len(timings[name].seconds) for name in "abcd"] == [3, 0, 0, 0]
    assert [calls[name] for name in "bcd"] == [1, 1, 1]


def test_other_errors_are_not_hidden():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure({"a": broken}, accept, QUICK)


def test_rounds_are_interleaved_and_rotate():
    order = []
    contenders = {name: lambda name=name: order.append(name) or "right" for name in "abc"}
    measure(contenders, accept, THREE_ROUNDS)
    assert "".join(order)[-9:] == "abcbcacab"


def test_short_work_is_repeated_and_long_work_is_not(monkeypatch):
    now = [0.0]

    def run_for(seconds):
        def run():
            now[0] += seconds
            return "right"

        return run

    monkeypatch.setattr(interleave.time, "perf_counter", lambda: now[0])
    effort = Effort(seconds=10, rounds=(1, 1000), sample=0.01)
    timings = measure({"short": run_for(0.003), "long": run_for(2.0)}, accept, effort)
    assert (timings["short"].calls, timings["long"].calls) == (4, 1)
    assert len(timings["short"].seconds) == int(10 / 2.012)
    assert timings["short"].seconds[0] == pytest.approx(0.003)


def test_quartiles():
    values = [3.0, 1.0, 2.0, 10.0, 4.0]
    np.testing.assert_allclose(quartiles(values), np.percentile(values, [25, 50, 75]))
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_notes_name_files_without_the_folders_of_the_machine():
    error = RuntimeError(
        "failed at /home/me/.venv/lib/torch/ops.h, line 9; see https://pytorch.org/docs/stable/cuda.html"
    )
    assert in_one_line(error) == "failed at ops.h, line 9; see https://pytorch.org/docs/stable/cuda.html"
    assert in_one_line(RuntimeError("1 / 2 of a/b is 0.5")) == "1 / 2 of a/b is 0.5"
