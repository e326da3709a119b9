"""The command ``groupdetr analyze``: the paper's measurements on data and sizes of one's own."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Union

import tyro

from ...data import AugmentationConfig
from ...data.config import DataConfig, DataPaths
from ...runs.config import CocoTrainingConfig
from ...runs.demo import digits_demo
from ..parsing import parse, read_flags, unknown_command
from .ablation import AblationCommand
from .agreement import AgreementCommand
from .assignment import AssignmentCommand
from .common import Analysis, Sweep
from .cost import CostCommand
from .distances import DistancesCommand
from .group_ap import GroupApCommand
from .reference_points import ReferencePointsCommand
from .report import ReportCommand
from .spread import SpreadCommand
from .sweep_groups import SweepGroupsCommand

__all__ = ["AnalyzeCommand", "parse_analysis"]

DEMO_EPOCHS = 12

_COMMANDS = {
    "assignment": AssignmentCommand,
    "sweep-groups": SweepGroupsCommand,
    "ablation": AblationCommand,
    "cost": CostCommand,
    "reference-points": ReferencePointsCommand,
    "distances": DistancesCommand,
    "group-ap": GroupApCommand,
    "agreement": AgreementCommand,
    "spread": SpreadCommand,
}


_subcommands = Union[  # noqa: UP007 (a union of a tuple)
    tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in {**_COMMANDS, "report": ReportCommand}.items())
]


@dataclass(frozen=True)
class AnalyzeCommand:
    """Repeat the paper's measurements."""

    measurement: _subcommands

    def __call__(self) -> None:
        self.measurement()


def parse_analysis(arguments: Sequence[str]) -> Callable[[], None]:
    """The measurement that a command line asks for.

    Args:
        arguments: the command line after ``analyze``. With COCO's folder the defaults are the paper's; otherwise those
            of the digits demo, which trains in minutes, though own images are also flipped and loaded by workers.
    """
    name, rest = (arguments or [""])[0], arguments[1:]
    if name == "report":
        return parse(ReportCommand, rest, prog="groupdetr analyze report")
    if name.startswith("-"):
        return parse(AnalyzeCommand, arguments[:1], prog="groupdetr analyze")
    if name not in _COMMANDS:
        raise unknown_command(name, [*_COMMANDS, "report"], "groupdetr analyze")
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
    values |= {"command": shlex.join(("groupdetr", "analyze", *arguments)), "output": Analysis.output}
    values["checkpoint_minutes"] = Sweep.checkpoint_minutes
    kind = _COMMANDS[name]
    default = kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
    return parse(kind, rest, prog=f"groupdetr analyze {name}", default=default)
