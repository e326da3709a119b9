"""Group DETR: check data, train, evaluate, predict, repeat the paper's measurements, show what runs where."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Union

import tyro

from . import __version__
from .commands.analyze import AnalyzeCommand, parse_analysis
from .commands.check import CheckCommand
from .commands.check_groups import CheckGroupsCommand
from .commands.env import EnvCommand
from .commands.eval import EvalCommand
from .commands.export import ExportCommand
from .commands.find_rate import FindRateCommand, sweep_defaults
from .commands.flags import FLAGS
from .commands.predict import PredictCommand
from .commands.recipes import RecipesCommand
from .commands.text import shown
from .commands.train import TrainCommand, training_defaults
from .training.faults import EXIT_STOPPED, TrainingStopped
from .training.last_words import are_launched, first_says

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
EXIT_INTERRUPTED = 130  # as shells have it for SIGINT
LONGEST_MESSAGE = 4000  # characters; names in a file of annotations have any length


def run(parse: Callable[[], Callable[[], None]]) -> None:
    """Parse a command and run it; settings and files that do not fit end the program with one sentence.

    Where several processes end with the same sentence, the first of them says it, and all have the same exit status.

    After SIGTERM or Ctrl-C a training ends with the exit status 75 (``EXIT_STOPPED``): a checkpoint is written, and
    ``--resume`` goes on from it. Other commands end with 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if os.environ.get("RANK", "0") != "0":
        _warn_of_own_images_alone()
    try:
        _parsed(parse)()
    except (OSError, ValueError) as error:
        sentence = f"error: {shown(str(error), LONGEST_MESSAGE)}"
        sys.exit(EXIT_FAILED if first_says(sentence) else sentence)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except TrainingStopped as stopped:
        if not first_says(str(stopped)):
            print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def _parsed(parse: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """The command. What the parser says of a wrong command line, several processes say once."""
    if not are_launched():
        return parse()
    text = io.StringIO()
    try:
        with redirect_stderr(text):
            return parse()
    except SystemExit as ended:
        if ended.code and first_says(text.getvalue()):
            text.truncate(0)
        raise
    finally:
        sys.stderr.write(text.getvalue())


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
        print(f"groupdetr_fast {__version__}")
        return

    def parse() -> Callable[[], None]:
        name, rest = (arguments or [""])[0], arguments[1:]
        # The command at hand alone, so that messages about a flag speak of no other command.
        if name == "train":
            default = training_defaults(rest)
            return tyro.cli(TrainCommand, args=rest, prog="groupdetr train", default=default, config=FLAGS)
        if name == "find-rate":
            sweep = sweep_defaults(rest)
            return tyro.cli(FindRateCommand, args=rest, prog="groupdetr find-rate", default=sweep, config=FLAGS)
        if name == "analyze":
            return parse_analysis(rest)
        if name in _COMMANDS:
            return tyro.cli(_COMMANDS[name], args=rest, prog=f"groupdetr {name}", config=FLAGS)
        every = {"train": TrainCommand, "find-rate": FindRateCommand, **_COMMANDS, "analyze": AnalyzeCommand}
        options = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in every.items())
        union = Union[options]  # noqa: UP007 (a union of a tuple)
        # The name alone, so that flags of a misspelt command do not call up those of all commands.
        return tyro.cli(union, args=arguments[:1], prog="groupdetr", description=__doc__, config=FLAGS)

    run(parse)
