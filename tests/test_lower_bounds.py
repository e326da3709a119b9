"""The lower bounds under which ``make test-oldest`` installs."""

import re

import lower_bounds
from lower_bounds import constraints, requirements


def test_every_requirement_has_a_lower_bound():
    names = {re.match(r"[\w.-]+", line).group() for line in requirements()}
    bounds = dict(line.split("==") for line in constraints())
    assert names - {"ninja", "wheel"} == set(bounds)
    assert bounds["torch"] == "2.11"


def test_of_several_bounds_the_highest_counts(monkeypatch):
    monkeypatch.setattr(lower_bounds, "requirements", lambda: ["hub>=1.3", "hub>=0.34", "hub>=1.10.1", "other"])
    assert list(constraints()) == ["hub==1.10.1"]
