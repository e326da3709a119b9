"""Group DETR: check data, train, evaluate, predict, repeat the paper's measurements, show what runs where."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from .commands.analyze import analyze_command
from .commands.check import CheckCommand
from .commands.env import EnvCommand
from .commands.eval import EvalCommand
from .commands.export import ExportCommand
from .commands.flags import FLAGS
from .commands.predict import PredictCommand
from .commands.recipes import RecipesCommand
from .commands.train import TrainCommand, training_defaults
from .training.faults import EXIT_STOPPED, TrainingStopped

__all__ = ["main", "run"]

EXIT_INTERRUPTED = 130  # what shells report of a program that SIGINT ended


def run(parse: Callable[[], Callable[[], None]]) -> None:
    """Parse a command and run it; settings and files that do not fit end the program with one sentence.

    After SIGTERM or Ctrl-C the exit status of a training is 75 (``EXIT_STOPPED``): a checkpoint is written, and
    ``--resume`` goes on from it.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        parse()()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of ``groupdetr``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def parse() -> Callable[[], None]:
        commands = (
            Annotated[TrainCommand, tyro.conf.subcommand("train", default=training_defaults(arguments))]
            | Annotated[EvalCommand, tyro.conf.subcommand("eval")]
            | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
            | Annotated[CheckCommand, tyro.conf.subcommand("check")]
            | Annotated[ExportCommand, tyro.conf.subcommand("export")]
            | Annotated[analyze_command(arguments), tyro.conf.subcommand("analyze")]
            | Annotated[RecipesCommand, tyro.conf.subcommand("recipes")]
            | Annotated[EnvCommand, tyro.conf.subcommand("env")]
        )
        return tyro.cli(commands, args=arguments, prog="groupdetr", description=__doc__, config=FLAGS)

    run(parse)
