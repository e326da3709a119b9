"""Group DETR: check data, train, evaluate, predict, repeat the paper's measurements, show what runs where."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Union

import tyro

from .commands.analyze import AnalyzeCommand, parse_analysis
from .commands.check import CheckCommand
from .commands.check_groups import CheckGroupsCommand
from .commands.env import EnvCommand, running_version
from .commands.eval import EvalCommand
from .commands.export import ExportCommand
from .commands.find_rate import FindRateCommand, sweep_defaults
from .commands.parsing import WrongCommandLine, parse, unknown_command
from .commands.predict import PredictCommand
from .commands.recipes import RecipesCommand
from .commands.text import shown
from .commands.train import TrainCommand, training_defaults
from .training.faults import EXIT_STOPPED, TrainingStopped
from .training.last_words import first_says

__all__ = ["main", "run"]

_COMMANDS = {
    "eval": EvalCommand,
    "predict": PredictCommand,
    "check": CheckCommand,
    "check-groups": CheckGroupsCommand,
    "export": ExportCommand,
    "recipes": RecipesCommand,
    "env": EnvCommand,
}
_OF_OWN_IMAGES = {"groupdetr_fast.data.unreadable"}  # loggers that speak of images which no other process has
EXIT_FAILED = 1  # what Python ends with after a sentence
EXIT_WRONG_COMMAND_LINE = 2  # as argparse has it
EXIT_INTERRUPTED = 130  # as shells have it for SIGINT
LONGEST_MESSAGE = 4000  # characters; names in a file of annotations have any length


def run(parse: Callable[[], Callable[[], None]]) -> None:
    """Parse a command and run it; settings and files that do not fit end the program with one sentence.

    The exit status is then 1, and 2 for a wrong command line. Where several processes end with the same
    sentence, the first of them says it, and all have the same exit status.

    After SIGTERM or Ctrl-C a training ends with the exit status 75 (``EXIT_STOPPED``): a checkpoint is written, and
    ``--resume`` goes on from it. Other commands end with 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if os.environ.get("RANK", "0") != "0":
        _warn_of_own_images_alone()
    try:
        parse()()
    except WrongCommandLine as error:
        sentence = f"error: {shown(str(error), LONGEST_MESSAGE)}"
        if not first_says(sentence):
            print(sentence, file=sys.stderr)
        sys.exit(EXIT_WRONG_COMMAND_LINE)
    except (OSError, ValueError) as error:
        sentence = f"error: {shown(_in_words(error), LONGEST_MESSAGE)}"
        sys.exit(EXIT_FAILED if first_says(sentence) else sentence)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except TrainingStopped as stopped:
        if not first_says(str(stopped)):
            print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def _in_words(error: OSError | ValueError) -> str:
    """What is wrong, where the system's words say less than they could: of files where there should be folders."""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        return f"there can be no folder {error.filename}: that, or what it is to be in, is a file"
    return str(error)


def _warn_of_own_images_alone() -> None:
    """Leave to the first of several processes what all of them would say; errors are everybody's own."""

    def is_own(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name in _OF_OWN_IMAGES

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_own)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of ``groupdetr``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    if arguments == ["--version"]:
        print(f"groupdetr_fast {running_version()}")
        return

    run(lambda: _command(arguments))


def _command(arguments: Sequence[str]) -> Callable[[], None]:
    name, rest = (arguments or [""])[0], arguments[1:]
    flag, equals, value = name.partition("=")
    if flag == "--version":  # main answers it where it stands alone
        surplus = shlex.quote(value if equals else rest[0])
        raise WrongCommandLine(f"there is no place for {surplus} behind --version, which stands alone")
    # The command at hand alone, so that messages about a flag speak of no other command.
    if name == "train":
        return parse(TrainCommand, rest, prog="groupdetr train", default=training_defaults(rest))
    if name == "find-rate":
        return parse(FindRateCommand, rest, prog="groupdetr find-rate", default=sweep_defaults(rest))
    if name == "analyze":
        return parse_analysis(rest)
    if name in _COMMANDS:
        return parse(_COMMANDS[name], rest, prog=f"groupdetr {name}")
    every = {"train": TrainCommand, "find-rate": FindRateCommand, **_COMMANDS, "analyze": AnalyzeCommand}
    if not name.startswith("-"):
        raise unknown_command(name, every, "groupdetr")
    options = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in every.items())
    union = Union[options]  # noqa: UP007 (a union of a tuple)
    return parse(union, arguments[:1], prog="groupdetr", description=__doc__)
