"""The lower bounds under which ``make test-oldest`` installs."""

import re

from lower_bounds import constraints, requirements


def test_every_requirement_has_a_lower_bound():
    names = {re.match(r"[\w.-]+", line).group() for line in requirements()}
    bounds = dict(line.split("==") for line in constraints())
    assert names - {"ninja", "wheel"} == set(bounds)
    assert bounds["torch"] == "2.11"
