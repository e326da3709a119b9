"""The rules by which a rate is suggested, on losses that are known."""

import itertools
import math

import pytest

from groupdetr_fast.training.rate_finder import RateSweep, SweepSettings


def sweep_of(losses):
    rates = tuple(10.0**-index for index in reversed(range(len(losses))))
    return RateSweep(rates, tuple(losses), tuple(losses), diverged=True)


def longest_falls(losses):
    """The longest falling selections of steps, by trying all."""
    falls = []
    for bits in range(1, 2 ** len(losses)):
        chosen = [index for index in range(len(losses)) if bits >> index & 1]
        if all(losses[a] > losses[b] for a, b in itertools.pairwise(chosen)):
            falls.append(chosen)
    longest = max(map(len, falls))
    return [fall for fall in falls if len(fall) == longest]


@pytest.mark.parametrize(
    "losses",
    [
        [5.0, 5.1, 5.0, 4.0, 3.0, 2.0, 1.5, 3.0, 9.0],
        [3.0, 1.0, 2.9, 2.8, 2.7, 0.5, 2.0, 9.0],
        [1.0, 2.0, 3.0, 4.0],
        [4.0, 3.0, 2.0, 1.0],
    ],
)
def test_the_valley_is_the_middle_of_the_longest_fall(losses):
    sweep = sweep_of(losses)
    assert sweep.valley in {sweep.rates[(fall[0] + fall[-1]) // 2] for fall in longest_falls(losses)}


def test_the_steepest_place_is_that_of_the_largest_fall():
    sweep = sweep_of([9.0, 8.9, 8.5, 6.0, 5.9, 5.8, 9.0])
    assert sweep.steepest == sweep.rates[2]  # between 8.9 and 6.0


def test_rates_rise_by_one_factor():
    settings = SweepSettings(rate_from=1e-6, rate_to=1e-2, rate_steps=17)
    rates = [settings.rate(step) for step in range(17)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[-1] == pytest.approx(1e-2)
    factors = [later / earlier for earlier, later in itertools.pairwise(rates)]
    assert factors == pytest.approx([10**0.25] * 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_from": 0.0}, "rate_from must be positive and below rate_to, got 0.0 and 0.1"),
        ({"rate_from": 0.2}, "rate_from must be positive and below rate_to"),
        ({"rate_to": math.nan}, "rate_from must be positive and below rate_to"),
        ({"rate_steps": 5}, "rate_steps must be at least 10, got 5"),
    ],
)
def test_wrong_settings_of_a_sweep_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SweepSettings(**settings)
