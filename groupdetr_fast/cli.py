"""Group DETR: check data, train, evaluate, predict, repeat the paper's measurements, show what runs where."""

import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from . import __version__, ops
from .analysis.commands import analyze_command
from .coco_training import CocoTrainingConfig, DataConfig, ModelConfig, train
from .commands.check import CheckCommand
from .commands.export import ExportCommand
from .commands.predict import PredictCommand
from .config_file import from_yaml
from .inference import EVAL_SETTINGS, InferenceSettings, describe_model
from .recipes import RECIPES, find_recipe
from .training.faults import EXIT_STOPPED, TrainingStopped
from .training.optimization import OptimizationConfig

__all__ = ["EnvCommand", "EvalCommand", "RecipesCommand", "TrainCommand", "main", "run", "training_defaults"]

FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(CocoTrainingConfig):
    """Train a detector on data in COCO's or YOLO's format.

    Data of your own (look at them with groupdetr check DIR first):
    groupdetr train --data-path DIR --backbone-weights imagenet

    A run of the paper on COCO:
    groupdetr train --recipe group_dab_detr_r50_12e --coco-path DIR

    After an interruption: the same command with --resume. Once more, with another seed:
    groupdetr train --config runs/coco/config.yaml --seed 1 --output runs/again

    To use the result: groupdetr predict runs/coco/checkpoints/best IMAGES

    Attributes:
        recipe: a run of the paper (see the command recipes); its values are the defaults of the other flags.
        config: yaml file of a configuration, such as config.yaml of an earlier run; its values are the defaults of the
            other flags.
    """

    recipe: str | None = None
    config: Path | None = None

    def __call__(self) -> None:
        train(self)


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Evaluate a checkpoint on data in COCO's or YOLO's format.

    Attributes:
        load: checkpoint of this package (file or folder), an original repository or transformers.
        model: name of the detector, for checkpoints that do not say it; those of this package do.
        data_path: folder of a data set in COCO's layout, that of Roboflow's COCO export, or YOLO's.
        coco_path: folder with COCO's ``val2017/`` and ``annotations/``; or name the two below.
        val_images: folder of images.
        val_annotations: COCO json.
        labels: "contiguous" or "category_id", for checkpoints that do not say it; "category_id" is what the original
            repositories do.
        eval_short_side: short side of the images in pixels; None for that of the checkpoint's training.
        eval_max_size: limit of the long side, which goes before; None for that of the checkpoint's training.
        image_mean: of the channels red, green, blue in [0, 1]; None for that of the checkpoint's training.
        image_std: standard deviation of the same.
        batch_size: images per process and step.
        workers: processes that load images, per process.
        precision: "no" for float32, or the type of mixed precision.
        top_k: detections per image.
        output: folder for ``detections.json`` and ``predictions.png``.
        pictures: images in ``predictions.png``; 0 for no picture.
    """

    load: Path
    model: str | None = None
    data_path: Path | None = None
    coco_path: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None
    labels: Literal["contiguous", "category_id"] | None = None
    eval_short_side: int | None = None
    eval_max_size: int | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    batch_size: int = OptimizationConfig.batch_size
    workers: int = DataConfig.workers
    precision: Literal["no", "bf16", "fp16"] = OptimizationConfig.precision
    top_k: int = CocoTrainingConfig.top_k
    output: Path = Path("runs/eval")
    pictures: int = CocoTrainingConfig.pictures

    def __call__(self) -> None:
        train(self.config())

    def config(self) -> CocoTrainingConfig:
        """The evaluation as a run.

        Raises:
            ValueError: if neither the checkpoint nor the flags name the detector.
        """
        header = describe_model(self.load, self.model)
        sizes = {name: getattr(self, name) for name in EVAL_SETTINGS}
        return CocoTrainingConfig(
            data=DataConfig(
                data_path=self.data_path,
                coco_path=self.coco_path,
                val_images=self.val_images,
                val_annotations=self.val_annotations,
                labels=self.labels or header.labels,
                workers=self.workers,
            ),
            model=ModelConfig.of_checkpoint(header, load=self.load, num_groups=1),  # one group is enough
            augmentation=InferenceSettings.from_header(header).with_sizes(**sizes).augmentation,
            optimization=OptimizationConfig(batch_size=self.batch_size, precision=self.precision),
            output=self.output,
            eval_only=True,
            top_k=self.top_k,
            pictures=self.pictures,
        )


@dataclass(frozen=True)
class RecipesCommand:
    """List the runs of the paper, with the AP that it reports for them and for the same run with one group.

    Attributes:
        name: write this run as yaml instead, to edit it and train with --config.
    """

    name: tyro.conf.Positional[str | None] = None

    def __call__(self) -> None:
        if self.name is not None:
            print(find_recipe(self.name).config().as_yaml(), end="")
            return
        rows = [("recipe", "K", "N", "epochs", "drop", "batch", "AP", "baseline")]
        for name, recipe in RECIPES.items():
            drops = "/".join(f"{epoch:g}" for epoch in recipe.lr_drop)
            numbers = (recipe.num_groups, recipe.num_queries, recipe.epochs, drops, recipe.images_per_step)
            baseline = "-" if recipe.baseline_ap is None else f"{recipe.baseline_ap:.1f}"
            rows.append((name, *map(str, numbers), f"{recipe.ap:.1f}", baseline))
        width = max(len(name) for name, *_ in rows)
        for name, *cells in rows:
            print(name.ljust(width), *(cell.rjust(12) for cell in cells))


@dataclass(frozen=True)
class EnvCommand:
    """Show versions, devices, and which kernel serves which op."""

    def __call__(self) -> None:
        print(f"groupdetr_fast  {__version__}")
        print(f"Python          {platform.python_version()} on {platform.system()} {platform.machine()}")
        print(f"torch           {torch.__version__}, {torch.get_num_threads()} CPU threads")
        for package in ("torchvision", "triton", "accelerate"):
            print(f"{package:14}  {_version(package)}")
        print(f"CUDA            {torch.version.cuda or 'torch was built without'}")
        for index in range(torch.cuda.device_count()):
            print(f"GPU {index}           {torch.cuda.get_device_name(index)}")
        for op, kernels in ops.backends().items():
            print(f"{op:18}  " + ", ".join(f"{device}: {kind}" for device, kind in kernels.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def training_defaults(arguments: Sequence[str], otherwise: CocoTrainingConfig | None = None) -> TrainCommand:
    """What the flags of a training start from.

    Args:
        arguments: the command line, of which ``--recipe`` and ``--config`` are read.
        otherwise: the defaults without them.

    Raises:
        OSError: if the file of the configuration cannot be read.
        ValueError: for an unknown recipe, one that these processes cannot train, or a wrong configuration.
    """
    name, file = _value_of("--recipe", arguments), _value_of("--config", arguments)
    config = otherwise or CocoTrainingConfig()
    if name is not None and file is not None:
        raise ValueError("give --recipe or --config, not both: groupdetr recipes NAME writes a recipe as a file")
    if file is not None:
        config = from_yaml(CocoTrainingConfig, Path(file))
    elif name is not None:
        config = find_recipe(name).config(processes=int(os.environ.get("WORLD_SIZE", "1")))
    return TrainCommand(**{f.name: getattr(config, f.name) for f in fields(CocoTrainingConfig)}, recipe=name)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def run(parse: Callable[[], Callable[[], None]]) -> None:
    """Parse a command and run it; settings and files that do not fit end the program with one sentence.

    After SIGTERM the exit status is 75 (``EXIT_STOPPED``): a checkpoint is written, and ``--resume`` goes on from it.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        parse()()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
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
