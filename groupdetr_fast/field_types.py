"""Values as the types that the fields of dataclasses have: settings from files, and from Python."""

import difflib
import os
import reprlib
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

__all__ = ["from_plain", "take_field_types"]

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


def from_plain(kind: type[T], values: Any, *, complete: bool = False) -> T:
    """The dataclass ``kind`` of what json or yaml can say: numbers, texts, lists, and dicts for dataclasses in it.

    Args:
        kind: the dataclass.
        values: by the names of fields; those that are not there have their defaults.
        complete: refuse values that leave a field out.

    Raises:
        ValueError: for an unknown or missing key or a value that does not fit; the message names the key.
    """
    return _build(kind, values, "", complete)


def take_field_types(config: Any, kind: type) -> None:
    """Give the fields of a frozen dataclass values of their types, for the ``__post_init__`` of the dataclass ``kind``.

    What has another type would be noticed late, or never: ``epochs=1.0``, ``batch_size="4"``. As in a yaml file, whole
    numbers serve as floats, but not floats as whole numbers. Lists serve as tuples, texts as paths and paths as texts,
    and numpy's numbers as Python's.

    Args:
        config: an instance of ``kind``; of a subclass, the fields of ``kind`` alone are looked at.
        kind: the dataclass.

    Raises:
        ValueError: for a value of another type; the message names the field, its type and the value.
    """
    hints = _hints(kind)
    for name in (each.name for each in fields(kind)):
        value = _convert(hints[name], getattr(config, name), name, names=_NAMES_IN_PYTHON)
        object.__setattr__(config, name, value)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(kind: type, values: Any, key: str, complete: bool) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{key or 'the file'} must have keys and values, got {reprlib.repr(values)}")
    prefix = f"{key}." if key else ""
    hints = _hints(kind)
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
        return value if isinstance(value, hint) else _build(hint, value, key, complete)
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
        elif get_origin(option) in (dict, Mapping):
            if isinstance(value, Mapping):
                return value
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
    return "keys and values" if get_origin(option) in (dict, Mapping) else names[option]
