"""Json files of runs, so that a process of its own can make a run and a later one can recognise it."""

import json
from pathlib import Path
from typing import Any

from ..config_file import from_plain, to_plain
from ..training.checkpoint import write_whole

__all__ = ["read_json", "to_json", "write_json"]


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as json would return it; ``config_file.from_plain`` is the inverse.

    Equal configurations have equal texts: each value has the type of its field, so that 40 for 40.0 is 40.0.
    """
    typed = from_plain(type(config), _values(config), complete=True)
    return _values(typed)


def read_json(path: Path) -> Any:
    """The content of a json file; None if there is none, or if it is only half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a json file that is either whole or not there."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _values(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(to_plain(config)))
