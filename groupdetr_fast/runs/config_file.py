"""Configurations, which are dataclasses, as yaml files or values of json, and back; and their values in Python."""

import difflib
import json
import os
import reprlib
import sys
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from ..yaml_files import read_yaml, yaml_text

__all__ = ["from_plain", "from_python", "from_yaml", "to_json", "to_plain", "to_yaml"]

T = TypeVar("T")

_NAMES = {
    bool: "true or false",
    float: "a number",
    int: "an integer",
    str: "a text",
    Path: "a path",
    type(None): "null",
}
_NAMES_IN_PYTHON = _NAMES | {bool: "True or False", type(None): "None"}


def to_yaml(config: Any, *, omit: tuple[str, ...] = ()) -> str:
    """A dataclass, whose fields may be dataclasses, tuples and paths, as yaml.

    Args:
        config: the dataclass.
        omit: fields to leave out.
    """
    return yaml_text({name: value for name, value in to_plain(config).items() if name not in omit})


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


def from_plain(kind: type[T], values: Any, *, complete: bool = False) -> T:
    """The inverse of :func:`to_plain`, for the dataclass ``kind``; tuples may have become lists.

    Args:
        kind: the dataclass.
        values: fields that are not there have their defaults.
        complete: refuse values that leave a field out.

    Raises:
        ValueError: for an unknown or missing key or a value that does not fit; the message names the key.
    """
    return _build(kind, values, "", complete)


def from_python(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that somebody gives in Python, with the types that the fields of the dataclass ``kind`` have.

    What has another type would be noticed late, or never: ``epochs=1.0``, ``batch_size="4"``. As in a yaml file, whole
    numbers serve as floats, but not floats as whole numbers. Lists serve as tuples, texts as paths and paths as texts,
    and numpy's numbers as Python's.

    Args:
        kind: the dataclass.
        values: by the names of fields.

    Raises:
        ValueError: for a value of another type; the message names the field, its type and the value.
    """
    hints = get_type_hints(kind)
    return {name: _convert(hints[name], value, name, names=_NAMES_IN_PYTHON) for name, value in values.items()}


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


def _build(kind: type, values: Any, key: str, complete: bool) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{key or 'the file'} must have keys and values, got {reprlib.repr(values)}")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind)
    names = [each.name for each in fields(kind)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; perhaps {prefix}{close[0]}" if close else ""
            raise ValueError(f"unknown key {prefix}{name}{hint}")
    for name in names:
        if complete and name not in values:
            raise ValueError(f"key {prefix}{name} is missing")
    converted = {name: _convert(hints[name], value, f"{prefix}{name}", complete) for name, value in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:  # the dataclass checks what its type does not say
        raise ValueError(f"{key}: {error}" if key else str(error)) from None


def _convert(hint: Any, value: Any, key: str, complete: bool = False, names: Mapping[Any, str] = _NAMES) -> Any:
    """A value as the type that a field has; ``names`` are those of types in messages."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, key, complete)
    if isinstance(value, np.generic):
        value = value.item()
    for option in _options(hint):
        arguments = get_args(option)
        if get_origin(option) is Literal:
            if isinstance(value, str) and value in arguments:
                return value
        elif get_origin(option) is tuple:
            if isinstance(value, list | tuple) and (arguments[-1] is ... or len(value) == len(arguments)):
                kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
                entry = f"each entry of {key}"
                return tuple(
                    _convert(kind, each, entry, complete, names) for kind, each in zip(kinds, value, strict=True)
                )
        elif option in (Path, str) and isinstance(value, str | os.PathLike):
            return option(value)
        elif option is float and type(value) is int and abs(value) <= sys.float_info.max:
            return float(value)
        elif type(value) is option:
            return value
    expected = " or ".join(_in_words(option, names) for option in _options(hint))
    raise ValueError(f"{key} must be {expected}, got {reprlib.repr(value)}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _in_words(option: Any, names: Mapping[Any, str]) -> str:
    arguments = get_args(option)
    if get_origin(option) is Literal:
        return str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
    if get_origin(option) is tuple:
        number = "" if arguments[-1] is ... else f" of length {len(arguments)}"
        return f"a list{number}, each entry {_in_words(arguments[0], names)}"
    return names[option]
