"""Configurations, which are dataclasses, as yaml files or values of json, and back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ..field_types import from_plain
from ..yaml_files import read_yaml, yaml_text

__all__ = ["from_yaml", "to_json", "to_plain", "to_yaml"]

T = TypeVar("T")


def to_yaml(config: Any, *, omit: tuple[str, ...] = ()) -> str:
    """A dataclass, whose fields may be dataclasses, tuples and paths, as yaml; the dataclasses in it come first.

    Args:
        config: the dataclass.
        omit: fields to leave out.
    """
    ordered = sorted(to_plain(config).items(), key=lambda item: not isinstance(item[1], dict))
    return yaml_text({name: value for name, value in ordered if name not in omit})


def from_yaml(kind: type[T], path: Path) -> T:
    """The inverse of :func:`to_yaml`, for the dataclass ``kind``. Fields that the file lacks have their defaults.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not yaml, or has an unknown key or a value that does not fit; the message names the file
            and the key.
    """
    content = read_yaml(path)
    try:
        return from_plain(kind, {} if content is None else content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass, whose fields may be dataclasses, tuples and paths, as numbers, texts, tuples and dicts."""
    return _plain(asdict(config))


def to_json(config: Any) -> dict[str, Any]:
    """:func:`to_plain` as json would return it, for :func:`from_plain`.

    Equal configurations have equal texts: each value has the type of its field, so that 40 for 40.0 is 40.0.
    """
    plain = json.loads(json.dumps(to_plain(config)))
    return json.loads(json.dumps(to_plain(from_plain(type(config), plain, complete=True))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, Path) else value
