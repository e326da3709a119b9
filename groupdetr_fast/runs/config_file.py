"""Configurations, which are dataclasses, as yaml files or values of json, and back."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..field_types import from_plain

__all__ = ["from_yaml", "has_layout", "read_yaml", "to_json", "to_plain", "to_yaml"]

T = TypeVar("T")

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Dumper(yaml.SafeDumper):
    """Writes tuples in one line, and in quotes the texts that YAML 1.1 or :class:`_Loader` would take for others."""


class _Loader(yaml.SafeLoader):
    """Reads booleans and numbers as YAML 1.2 does: ``no`` is a text, and ``1e-4`` a number."""


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
for _side in (_Dumper, _Loader):
    _side.add_implicit_resolver(
        _FLOAT, re.compile(r"[-+]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.inf)\Z"), list("-+.0123456789")
    )


def to_yaml(config: Any, *, omit: tuple[str, ...] = ()) -> str:
    """A dataclass, whose fields may be dataclasses, tuples and paths, as yaml; the dataclasses in it come first.

    Args:
        config: the dataclass.
        omit: fields to leave out.
    """
    ordered = sorted(to_plain(config).items(), key=lambda item: not isinstance(item[1], dict))
    values = {name: value for name, value in ordered if name not in omit}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def has_layout(text: str) -> bool:
    """Whether a yaml text is laid out as :func:`to_yaml` lays out its content, which leaves no comments.

    Raises:
        yaml.YAMLError: if it is not yaml.
    """
    return yaml.serialize(yaml.compose(text, Loader=_Loader), Dumper=_Dumper, allow_unicode=True) == text


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


def read_yaml(path: Path) -> Any:
    """The content of a yaml file, with booleans and numbers as YAML 1.2 has them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not yaml; the message names the file.
    """
    try:
        return yaml.load(path.read_text(), Loader=_Loader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as yaml: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path} cannot be read as yaml: it is nested too deeply") from None
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
