"""The command ``groupdetr train``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..runs.config import CocoTrainingConfig
from ..runs.config_file import from_yaml
from ..runs.evaluate import evaluate_checkpoint
from ..runs.recipes import launched_recipe
from ..runs.resuming import described_checkpoint
from ..runs.train import train
from .parsing import WrongCommandLine, read_flags

__all__ = ["TrainCommand", "training_defaults"]

HELP = {"-h", "--help"}


@dataclass(frozen=True, kw_only=True)
class TrainCommand(CocoTrainingConfig):
    """Train a detector on data in COCO's or YOLO's format.

    Data of your own (look at them with groupdetr check DIR first):
    groupdetr train --data-path DIR --backbone-weights imagenet

    A run of the paper on COCO:
    groupdetr train --recipe group_dab_detr_r50_12e --coco-path DIR

    After an interruption: the same command with --resume. To begin again in the same folder: --overwrite.
    Once more, with another seed:
    groupdetr train --config runs/coco/config.yaml --seed 1 --output runs/again

    A pretrained detector of Hugging Face transformers, trained on data of your own:
    groupdetr train --model transformers:PekingU/rtdetr_v2_r18vd --data-path DIR

    To use the result: groupdetr predict runs/coco/checkpoints/best IMAGES

    Attributes:
        recipe: a run of the paper (see the command recipes); its values are the defaults of the other flags.
        config: yaml file of a configuration, such as config.yaml of an earlier run; its values are the defaults of the
            other flags.
    """

    recipe: str | None = None
    config: Path | None = None

    def __call__(self) -> None:
        if self.eval_only:
            evaluate_checkpoint(self)
        else:
            train(self)


@dataclass(frozen=True)
class _Origin:
    """The flags that say where the defaults of the other flags come from; ``model`` is empty if it is not given, and
    ``output`` None, for that of the configuration, or the folder ``eval`` in it for an evaluation."""

    recipe: str | None = None
    config: Path | None = None
    model: str = ""
    output: Path | None = None
    resume: bool = False
    eval_only: bool = False


def training_defaults(arguments: Sequence[str], otherwise: CocoTrainingConfig | None = None) -> TrainCommand:
    """What the flags of a training start from.

    Args:
        arguments: the command line, of which ``--recipe`` and ``--config`` are read; with a ``--model`` of
            transformers, that model's sizes of images and number of groups are the defaults, and with ``--eval-only``
            that of ``--output`` is the folder ``eval`` in the configuration's. If they ask for help, nothing in them
            is refused.
        otherwise: the defaults without them.

    Raises:
        OSError: for a configuration or a checkpoint that cannot be read.
        ValueError: for an unknown recipe or detector, a recipe that these processes cannot train, a configuration that
            is wrong or missing, or a model of transformers that cannot be read.
        WrongCommandLine: for values that these flags do not take.
    """
    otherwise = otherwise or CocoTrainingConfig()
    try:
        recipe, config = _chosen(arguments, otherwise)
    except (OSError, ValueError, WrongCommandLine):
        if not HELP.intersection(arguments):
            raise
        recipe, config = None, otherwise
    return TrainCommand(**{f.name: getattr(config, f.name) for f in fields(CocoTrainingConfig)}, recipe=recipe)


def _chosen(arguments: Sequence[str], config: CocoTrainingConfig) -> tuple[str | None, CocoTrainingConfig]:
    """The recipe of a command line, and what the other flags start from, which is ``config`` without any."""
    origin = read_flags(_Origin, arguments)
    if origin.recipe is not None and origin.config is not None:
        raise ValueError("give --recipe or --config, not both: groupdetr recipes NAME writes a recipe as a file")
    if origin.config is not None:
        if not origin.config.is_file():
            raise ValueError(f"there is no configuration file {origin.config}: --config takes a config.yaml of a run")
        config = from_yaml(CocoTrainingConfig, origin.config)
    elif origin.recipe is not None:
        config = launched_recipe(origin.recipe)
    if origin.model:
        folder = origin.output or config.output
        config = config.with_model(origin.model, described_checkpoint(folder) if origin.resume else None)
    if origin.eval_only:  # the folder itself may be that of the run whose weights are evaluated
        config = replace(config, output=config.output / "eval")
    return origin.recipe, config
