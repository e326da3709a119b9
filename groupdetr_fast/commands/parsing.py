"""How a command line becomes a command, and the one sentence that says what is wrong with it.

tyro parses. It tells of what it refuses by a hook, which its authors keep private so far: where a version of tyro has
none, or another one, its own box of several lines is shown in place of the sentence.
"""

import difflib
import io
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..training.last_words import first_says

__all__ = ["WrongCommandLine", "parse", "read_flags", "unknown_command"]

T = TypeVar("T")

FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)

_ONE = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _fixed_number_of_values(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Of two numbers or None the flag takes two: tyro would let it take all that follow, a checkpoint too."""
    values = _of_fixed_length(kind.type)
    if values is None or values == kind.type:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(values, kind.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(  # None is a default alone
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


class WrongCommandLine(Exception):
    """What is wrong with a command line, in one sentence."""


def parse(
    kind: Any, arguments: Sequence[str], *, prog: str, default: Any = None, description: str | None = None
) -> Any:
    """The command that a command line asks for.

    Args:
        kind: a dataclass, of which the fields, and those of dataclasses in it, are flags; or a union of commands.
        arguments: what follows ``prog``.
        prog: the beginning of the command line, for messages.
        default: the values of flags that are not given; those of ``kind`` without it.
        description: in place of the docstring of ``kind``.

    Raises:
        SystemExit: after ``--help``.
        ValueError: for values that do not fit together.
        WrongCommandLine: for flags that there are not, and for values of another number or type than a flag takes.
    """
    values: dict[str, Any] = {} if default is None else {"default": default}
    with _said_once(), _refused_in_words(kind, arguments, prog):
        return tyro.cli(
            kind, args=arguments, prog=prog, description=description, config=FLAGS, registry=_REGISTRY, **values
        )


def read_flags(kind: type[T], arguments: Sequence[str]) -> T:
    """The flags of a command line that are fields of the dataclass ``kind``; the others are ignored.

    Raises:
        WrongCommandLine: as :func:`parse`.
    """
    with _said_once(), _refused_in_words(kind, arguments, "groupdetr"):
        found, _ = tyro.cli(
            kind, args=arguments, config=FLAGS, registry=_REGISTRY, return_unknown_args=True, add_help=False
        )
        return found


def unknown_command(name: str, commands: Collection[str], prog: str) -> WrongCommandLine:
    """What to say of the name of a command that there is not, or of none."""
    *others, last = commands
    known = f"{', '.join(others)} and {last}"
    if not name:
        return WrongCommandLine(f"name a command: {prog} has {known}")
    return WrongCommandLine(f"there is no command {shlex.quote(name)}: {_meant(name, commands)}{prog} has {known}")


@contextmanager
def _said_once() -> Iterator[None]:
    """What tyro itself says of a wrong command line, the first of several processes says for all."""
    text = io.StringIO()
    try:
        with redirect_stderr(text):
            yield
    except SystemExit as ended:
        if ended.code and first_says(text.getvalue()):
            text = io.StringIO()
        raise
    finally:
        sys.stderr.write(text.getvalue())


def _refused_in_words(kind: Any, arguments: Sequence[str], prog: str) -> AbstractContextManager[Any]:
    hook: Callable[[Any], AbstractContextManager[Any]] | None
    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", None)
    if hook is None:
        return nullcontext()

    def refuse(event: Any) -> None:
        try:
            refusal = _refusal(event, kind, arguments, prog)
        except AttributeError:  # the event of another version
            return
        if refusal is not None:
            raise refusal

    return hook(refuse)


def _refusal(event: Any, kind: Any, arguments: Sequence[str], prog: str) -> Exception | None:
    """What to say of an event of tyro's; None if nothing is known of such an event."""
    name, flags = type(event).__name__, _flags_of(kind)
    surplus = {"UnrecognizedArgs": "tokens", "MissingArgs": "unrecognized_tokens"}.get(name)
    if surplus and getattr(event, surplus):  # said first: what is missing may be the misspelt flag
        return WrongCommandLine(_surplus(getattr(event, surplus)[0], flags, arguments, prog))
    if name == "MissingArgs":
        missing = [each.arg.lowered for each in event.missing_arguments]
        names = [each.name_or_flags[-1] if each.name_or_flags[-1] in flags else each.metavar for each in missing]
        return WrongCommandLine(f"give {' and '.join(names)}: {prog} --help says what that is")
    if name == "MissingSubcommand":
        return unknown_command(event.found_token or "", list(event.subcommand_spec.parser_from_name), prog)
    if name == "InstantiationFailure" and event.argument is None:
        return ValueError(event.message)  # raised by the dataclass's own checks
    if name not in ("BadValue", "InvalidChoice", "InstantiationFailure"):
        return None
    flag = event.argument.lowered.name_or_flags[-1]
    if flag not in flags:  # a positional argument; it may have swallowed the value of a misspelt flag
        known = {*flags, *(f"--no{each[1:]}" for each, of in flags.items() if of is bool), "--"}
        unknown = [each for each in arguments if each.startswith("--") and _flag_of(each) not in known]
        return WrongCommandLine(_surplus(unknown[0], flags, arguments, prog)) if unknown else None
    got = shlex.join(_values(arguments, flag)[: _most(flags[flag])])
    return WrongCommandLine(f"{flag} takes {_takes(flags[flag])}, and got {got or 'nothing'}")


def _surplus(token: str, flags: Mapping[str, Any], arguments: Sequence[str], prog: str) -> str:
    """What to say of something that has no place in a command line."""
    if token.startswith("-") and not _is_number(token):
        flag = _flag_of(token)
        if flag == "--version":
            return "--version stands alone, without a command: groupdetr --version"
        if flag in flags:
            return f"{flag} follows --, behind which nothing is a flag"
        return f"there is no flag {flag}: {_meant(flag, flags)}{prog} --help lists all"
    for flag, kind in flags.items():
        if (most := _most(kind)) is not None and token in _values(arguments, flag)[most : most + 1]:
            return f"there is no place for {shlex.quote(token)} behind {flag}, which takes {_takes(kind)}"
    return f"there is no place for {shlex.quote(token)}: {prog} --help lists what there is one for"


def _meant(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {found[0]}? " if found else ""


def _flags_of(kind: Any) -> dict[str, Any]:
    """The flags of a command, each with the type of its values; not what is given without a flag."""
    if not is_dataclass(kind):
        return {}
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            found |= _flags_of(hint)
        elif not any(mark in (tyro.conf.Positional, tyro.conf.Suppress) for mark in getattr(hint, "__metadata__", ())):
            found[f"--{name.replace('_', '-')}"] = hint
    return found


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _flag_of(token: str) -> str:
    """The flag in a part of a command line, as the help writes it."""
    return token.partition("=")[0].replace("_", "-")


def _values(arguments: Sequence[str], flag: str) -> list[str]:
    """What a command line has behind a flag, where it is given last; tyro may take only the first of these."""
    last = max((at for at, token in enumerate(arguments) if _flag_of(token) in (flag, f"--no{flag[1:]}")), default=None)
    if last is None:
        return []
    _, equals, value = arguments[last].partition("=")
    return [value] * bool(equals) + list(takewhile(lambda token: not token.startswith("--"), arguments[last + 1 :]))


def _most(kind: Any) -> int | None:
    """How many values a flag takes; None if it takes all up to the next flag, whether they fit or not."""
    if _is_repeated(kind):
        return 1
    if (values := _of_fixed_length(kind)) is not None:
        return len(get_args(values))
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple or any(get_origin(each) is tuple for each in inner):
        return None
    return 0 if kind is bool else 1


def _is_repeated(kind: Any) -> bool:
    """Whether a flag takes one value each time that it is given."""
    return tyro.conf.UseAppendAction in getattr(kind, "__metadata__", ())


def _of_fixed_length(kind: Any) -> Any:
    """The tuple of a known number of values that a flag takes, perhaps beside None; None if it takes something else."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = [each for each in options if each is not NoneType]
    is_fixed = len(kinds) == 1 and get_origin(kinds[0]) is tuple and Ellipsis not in get_args(kinds[0])
    return kinds[0] if is_fixed else None


def _takes(kind: Any) -> str:
    """What a flag takes, in words."""
    if kind is bool:
        return "no value"
    if _is_repeated(kind):
        return f"{_takes(get_args(get_args(kind)[0])[0])} each time"
    kind = _of_fixed_length(kind) or kind
    *others, last = sorted(_alternatives(kind), key=lambda word: word == "None")
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(kind: Any) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [word for each in inner for word in _alternatives(each)]
    if origin is Literal:
        return [str(each) for each in inner]
    if origin is tuple:
        many = _MANY.get(inner[0]) or f"any of {_takes(inner[0])}"
        return [many if Ellipsis in inner else f"{len(inner)} {many}"]
    return {NoneType: ["None"], bool: ["True", "False"]}.get(kind) or [_ONE[kind]]
