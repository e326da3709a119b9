"""Times several ways to do the same work in one run, round by round, after their results were checked.

A slow phase of the machine then falls on all of them alike, and a ratio of two times of one round says more than a
ratio of two runs. Nothing is timed whose result is wrong.
"""

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["QUICK", "Effort", "Timing", "in_one_line", "in_turn", "measure", "quartiles"]

Key = TypeVar("Key")
LONG_CALL = 0.5  # seconds after which a call is its own warm-up
MAX_CALLS = 10_000
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[\w.+@-]+/)+")  # of absolute paths; addresses of pages stay


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: for one comparison, as far as ``rounds`` allow.
        rounds: fewest and most rounds.
        sample: shortest time of one sample; quicker work is repeated inside it, since a clock and a cold cache would
            tell more of themselves than of the work.
    """

    seconds: float = 12.0
    rounds: tuple[int, int] = (3, 41)
    sample: float = 0.01


QUICK = Effort(seconds=0.0, rounds=(1, 1), sample=0.0)


@dataclass
class Timing:
    """What became of a contender.

    Attributes:
        status: ``"ok"``; ``"wrong"`` if its result is; ``"missing"`` if it is not installed or cannot do the work.
        note: why it is not ``"ok"``.
        calls: calls in one sample.
        seconds: time of one call, in every round.
    """

    status: str = "ok"
    note: str = ""
    calls: int = 1
    seconds: list[float] = field(default_factory=list)


def measure(
    contenders: Mapping[Key, Callable[[], Any]], check: Callable[[Key, Any], None], effort: Effort
) -> dict[Key, Timing]:
    """Check, then time, all contenders.

    Args:
        contenders: what to run; each is called without arguments.
        check: gets a contender's key and result, and raises AssertionError if the result is wrong.
        effort: how long to measure.

    Returns:
        A timing for each contender; those that are ``"ok"`` have the same number of rounds.
    """
    timings, first_calls = {}, {}
    for key, run in contenders.items():
        timings[key], seconds = _gate(run, lambda result, key=key: check(key, result))
        if timings[key].status == "ok":
            first_calls[key] = seconds
    gc.collect()
    gc.freeze()  # collecting before every sample would otherwise take longer than the samples
    try:
        _take_rounds({key: contenders[key] for key in first_calls}, first_calls, timings, effort)
    finally:
        gc.unfreeze()
    return timings


def _take_rounds(
    able: Mapping[Key, Callable[[], Any]],
    first_calls: Mapping[Key, float],
    timings: Mapping[Key, Timing],
    effort: Effort,
) -> None:
    round_seconds = 0.0
    for key, seconds in first_calls.items():
        if seconds < LONG_CALL:  # it was slowed by what happens once only
            seconds = _sample(able[key], 1)
            timings[key].calls = min(max(1, math.ceil(effort.sample / seconds)), MAX_CALLS)
        round_seconds += seconds * timings[key].calls
    fewest, most = effort.rounds
    for number in range(min(max(fewest, int(effort.seconds / max(round_seconds, 1e-9))), most)):
        for key in in_turn(able, number):
            timings[key].seconds.append(_sample(able[key], timings[key].calls))


def in_turn(keys: Iterable[Key], number: int) -> list[Key]:
    """The keys in the order of a round: each round begins with another one, so that every one begins at times."""
    keys = list(keys)
    first = number % max(len(keys), 1)
    return keys[first:] + keys[:first]


def in_one_line(error: Exception) -> str:
    """A short note of what went wrong; of files it has the names, not the folders of this machine."""
    return _FOLDERS.sub("", " ".join(str(error).split()))[:200] or type(error).__name__


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def _gate(run: Callable[[], Any], check: Callable[[Any], None]) -> tuple[Timing, float]:
    start = time.perf_counter()
    try:
        result = run()
        seconds = time.perf_counter() - start
        check(result)
    except (ImportError, NotImplementedError) as error:
        return Timing("missing", in_one_line(error)), 0.0
    except AssertionError as error:
        return Timing("wrong", in_one_line(error)), 0.0
    return Timing(), seconds


def _sample(run: Callable[[], Any], calls: int) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    finally:
        gc.enable()
