"""The command ``groupdetr check-groups``."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ..group_check import check_groups

__all__ = ["CheckGroupsCommand"]


@dataclass(frozen=True, kw_only=True)
class CheckGroupsCommand:
    """Measure whether the groups of queries of a detector see each other in training. The exit status is 1 if they do.

    Also measured is whether images of a batch see each other, whether targets reach groups by denoising queries, and
    whether the loss of evaluation mode is that of one group. Everything runs on the CPU, on random images.

    Attributes:
        model: a model of this package by name, or a checkpoint of one, such as the folder of a run; a directory of
            transformers, or transformers:DIR_OR_ID; a configuration of rfdetr, such as RFDETRNano; or
            package.module:function, a function that returns a module, (module, inputs), (module, inputs, loss) or a
            gd.Detector.
        num_groups: K, where training and evaluation mode both have all K groups; else it is found.
        batch_size: images, at least 2.
        image_size: height and width of the images in pixels; None for a size that fits the model.
        json: print the report as json.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    num_groups: int | None = None
    batch_size: int = 2
    image_size: tuple[int, int] | None = None
    json: bool = False

    def __call__(self) -> None:
        sys.path.insert(0, "")  # functions of the working directory, as with python -m
        report = check_groups(
            self.model, num_groups=self.num_groups, batch_size=self.batch_size, image_size=self.image_size
        )
        print(json.dumps(report.to_json(), indent=2) if self.json else report)
        if not report.ok:
            raise ValueError(f"{report.model} has {len(report.faults)} fault{'' if len(report.faults) == 1 else 's'}")
