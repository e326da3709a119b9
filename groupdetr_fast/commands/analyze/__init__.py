"""The command ``groupdetr analyze``: the paper's measurements on data and sizes of one's own."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Union

import tyro

from ...data import AugmentationConfig
from ...data.config import DataConfig, DataPaths
from ...runs.config import CocoTrainingConfig
from ...runs.recipes import digits_demo
from ..flags import read_flags
from .ablation import AblationCommand
from .assignment import AssignmentCommand
from .common import Analysis
from .cost import CostCommand
from .distances import DistancesCommand
from .group_ap import GroupApCommand
from .reference_points import ReferencePointsCommand
from .report import ReportCommand
from .sweep_groups import SweepGroupsCommand

__all__ = ["analyze_command"]

DEMO_EPOCHS = 12

_COMMANDS = {
    "assignment": AssignmentCommand,
    "sweep-groups": SweepGroupsCommand,
    "ablation": AblationCommand,
    "cost": CostCommand,
    "reference-points": ReferencePointsCommand,
    "distances": DistancesCommand,
    "group-ap": GroupApCommand,
}


def analyze_command(arguments: Sequence[str]) -> type:
    """The command ``analyze`` with its subcommands, as a dataclass for ``tyro.cli`` whose instances are called.

    Args:
        arguments: the whole command line. With COCO's folder the defaults are the paper's; otherwise those of the
            digits demo, which train in minutes, though own images are also flipped and loaded by other processes.
    """
    data = read_flags(DataPaths, arguments)
    if data.coco_path is not None:
        config = CocoTrainingConfig()
    else:
        config = digits_demo(compose=False)
        config = replace(config, optimization=replace(config.optimization, epochs=DEMO_EPOCHS), evaluate_every=3)
    if data.given and data.coco_path is None:
        flip = AugmentationConfig.flip
        config = replace(config, data=DataConfig(), augmentation=replace(config.augmentation, flip=flip))
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values |= {"command": shlex.join(("groupdetr", *arguments)), "output": Analysis.output}
    commands = []
    for name, kind in _COMMANDS.items():
        default = kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
        commands.append(Annotated[kind, tyro.conf.subcommand(name, default=default)])
    commands.append(Annotated[ReportCommand, tyro.conf.subcommand("report")])
    subcommands = Union[tuple(commands)]  # noqa: UP007 (a union of a list)

    @dataclass(frozen=True)
    class AnalyzeCommand:
        """Repeat the paper's measurements."""

        measurement: subcommands

        def __call__(self) -> None:
            self.measurement()

    return AnalyzeCommand
