"""The command ``groupdetr analyze agreement``."""

from dataclasses import dataclass

import torch

from ...analysis import plots
from ...analysis.agreement import train_and_measure
from .common import Analysis

__all__ = ["AgreementCommand"]


@dataclass(frozen=True, kw_only=True)
class AgreementCommand(Analysis):
    """How far the gradients of the groups agree, over the first steps of a training.

    Near 1, each group repeats the gradient of the others; near 0, their sum has what no single group has.

    Attributes:
        steps: optimiser steps to train; 0 to measure the model as it is, such as that of ``load``.
        every: steps between two measurements.
        batches: of the evaluation set, over which a measurement is averaged.
    """

    steps: int = 200
    every: int = 20
    batches: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        for name in ("every", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __call__(self) -> None:
        torch.set_num_threads(self.threads)
        rows = []
        folder = self.output / "agreement"
        for row in train_and_measure(self.training(), folder, steps=self.steps, every=self.every, batches=self.batches):
            rows.append(row)
            print(f"step {row['step']}: cosine {row['decoder']:.3f} in the decoder, loss {row['loss']:.3f}", flush=True)
        images = self.batches * self.optimization.images_per_batch
        self.write(
            "agreement",
            plots.draw_agreement(rows),
            "Agreement of the groups' gradients",
            f"Cosine between the gradients of two groups, on average over all pairs of {self.model.num_groups} groups, "
            f"on {images} images of the evaluation set: of the decoder's shared parameters, and of what the encoder "
            f"receives; seed {self.optimization.seed}.",
            rows,
            rows,
        )
