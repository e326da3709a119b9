"""Configurations as json, so that a process of its own can make a run and a later one can recognise it."""

import json
from typing import Any

from ..runs.config_file import from_plain, to_plain

__all__ = ["to_json"]


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as json would return it; ``config_file.from_plain`` is the inverse.

    Equal configurations have equal texts: each value has the type of its field, so that 40 for 40.0 is 40.0.
    """
    typed = from_plain(type(config), _values(config), complete=True)
    return _values(typed)


def _values(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(to_plain(config)))
