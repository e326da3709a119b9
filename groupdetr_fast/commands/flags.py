"""Flags that are read before the rest of a command line, since the defaults of other flags depend on them."""

from collections.abc import Sequence
from typing import TypeVar

import tyro

__all__ = ["FLAGS", "read_flags"]

T = TypeVar("T")

FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def read_flags(kind: type[T], arguments: Sequence[str]) -> T:
    """The flags of a command line that are fields of the dataclass ``kind``; the others are ignored."""
    found, _ = tyro.cli(kind, args=arguments, prog="groupdetr", config=FLAGS, return_unknown_args=True, add_help=False)
    return found
