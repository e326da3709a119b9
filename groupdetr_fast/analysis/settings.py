"""Configurations as json, so that a process of its own can run them and a later one can recognise them."""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..training.checkpoint import write_whole

__all__ = ["from_json", "read_json", "to_json", "write_json"]

T = TypeVar("T")


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass, whose fields may be dataclasses, tuples and paths, as json would return it."""
    return json.loads(json.dumps(asdict(config), default=str))


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """The inverse of :func:`to_json`, for the dataclass ``kind``.

    Raises:
        KeyError: if a field is missing, as in a file of another version.
    """
    hints = get_type_hints(kind)
    return kind(**{f.name: _restore(hints[f.name], values[f.name]) for f in fields(kind)})


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if is_dataclass(hint):
        return from_json(hint, value)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if Path in (hint, *get_args(hint)) else value


def read_json(path: Path) -> Any:
    """The content of a json file; None if there is none, or if it is only half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a json file that is either whole or not there."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
