"""Yaml files, with booleans and numbers as YAML 1.2 has them: ``no`` is a text, and ``1e-4`` a number."""

import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["has_layout", "read_yaml", "yaml_text"]

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Dumper(yaml.SafeDumper):
    """Writes tuples in one line, and in quotes the texts that YAML 1.1 or :class:`_Loader` would take for others."""


class _Loader(yaml.SafeLoader):
    """Reads booleans and numbers as YAML 1.2 does."""


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


def read_yaml(path: Path) -> Any:
    """The content of a yaml file.

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


def yaml_text(content: Any) -> str:
    """The inverse of :func:`read_yaml`, with keys in their order and tuples in one line."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def has_layout(text: str) -> bool:
    """Whether a yaml text is laid out as :func:`yaml_text` lays out its content, which leaves no comments.

    Raises:
        yaml.YAMLError: if it is not yaml.
    """
    return yaml.serialize(yaml.compose(text, Loader=_Loader), Dumper=_Dumper, allow_unicode=True) == text
