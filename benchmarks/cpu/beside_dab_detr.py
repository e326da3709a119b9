"""The original DAB-DETR beside ours, step by step: the same weights, images, rates and optimiser.

    git clone https://github.com/IDEA-Research/DAB-DETR
    OMP_NUM_THREADS=1 python benchmarks beside_dab_detr --original DAB-DETR

Both train on the embedded digits, with one group and sizes that a CPU trains in minutes. The original has its own
transformer, matcher and losses, and the weights that it draws; the small backbone, which it does not have, is a copy of
ours. Rounding differs, and differences grow with the steps, as between any two trainings.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import groupdetr_fast as gd
from cpu.originals.dab_detr import dab_detr
from groupdetr_fast.data import Batch
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.demo import digits_demo
from groupdetr_fast.runs.loaders import evaluation_loader, evaluation_set, training_loader, training_set
from groupdetr_fast.training.optimization import build_optimizer, build_scheduler

__all__ = ["rows"]

SIZES = {"d_model": 64, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 3, "dim_feedforward": 128}
HEADER = ("step", "ours", "theirs", "difference", "contents, ours", "theirs", "boxes, ours", "theirs")


@dataclass
class _Training:
    """A model, its loss of a batch, and what moves its weights, as in ``groupdetr train``."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    boxes: Callable[[Any], Tensor]  # of the model's output: those of the last layer, [B, N, 4]
    last_layer: str  # its name
    queries_first: bool  # whether its output is [N, B, d]
    config: CocoTrainingConfig
    steps_per_epoch: int

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = build_optimizer(self.model, self.config.optimization)
        self.scheduler = build_scheduler(self.optimizer, self.config.optimization, self.steps_per_epoch)

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimization.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    @torch.no_grad()
    def over_images(self, batch: Batch) -> tuple[float, float]:
        """How far contents (relative to their length) and boxes of a query lie from their mean over the images."""
        kept: list[Tensor] = []
        model = copy.deepcopy(self.model)  # whose batch norms may gather statistics
        model.get_submodule(self.last_layer).register_forward_hook(lambda layer, inputs, out: kept.append(out))
        boxes = self.boxes(model(batch.images, batch.masks))
        content = kept[0].transpose(0, 1) if self.queries_first else kept[0]
        relative = (content - content.mean(0)).square().mean() / content.square().mean()
        return relative.sqrt().item(), (boxes - boxes.mean(0)).square().mean().sqrt().item()


def rows(checkout: Path, config: CocoTrainingConfig, *, steps: int, every: int, images: int) -> Iterator[list[str]]:
    """Train both, and measure after the first step and every so many.

    Args:
        checkout: of the original.
        config: the training.
        steps: optimiser steps.
        every: steps between two measurements.
        images: of the evaluation set, on which contents and boxes are compared.

    Yields:
        Cells of :data:`HEADER`.

    Raises:
        ValueError: if the folder is no checkout of the original.
    """
    dataset = training_set(config)
    loader = training_loader(dataset, config)
    torch.manual_seed(config.optimization.seed)
    ours = config.model.build(dataset.num_classes)
    theirs = dab_detr(checkout, ours)
    gd.load_checkpoint(ours, theirs.net.state_dict())
    criterion = gd.build_criterion(ours)
    last = config.model.decoder_layers - 1
    schedule = (config, len(loader))
    trainings = (
        _Training(
            ours,
            lambda batch: criterion(ours(batch.images, batch.masks), batch.targets)["loss"],
            lambda output: output.boxes[-1],
            f"decoder.layers.{last}",
            False,
            *schedule,
        ),
        _Training(
            theirs,
            lambda batch: theirs.losses(theirs(batch.images, batch.masks), batch.targets)["loss"],
            lambda output: output["pred_boxes"],
            f"net.transformer.decoder.layers.{last}",
            True,
            *schedule,
        ),
    )
    held = next(iter(evaluation_loader(evaluation_set(config), replace(config, eval_batch_size=images)))).to("cpu")
    for step, batch in enumerate(itertools.islice(_endless(loader), steps), start=1):
        losses = [training.step(batch) for training in trainings]
        if step == 1 or step % every == 0 or step == steps:
            (content, box), (their_content, their_box) = (training.over_images(held) for training in trainings)
            difference = abs(losses[0] - losses[1]) / losses[1]
            yield [
                str(step),
                *(f"{loss:.4f}" for loss in losses),
                f"{difference:.0e}",
                *(f"{value:.1%}" for value in (content, their_content)),
                *(f"{value:.3f}" for value in (box, their_box)),
            ]


def _endless(loader: Any) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield batch.to("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="checkout of the original repository")
    parser.add_argument("--steps", type=int, default=376, help="optimiser steps of 16 images")
    parser.add_argument("--every", type=int, default=94, help="steps between two rows")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--images", type=int, default=64, help="on which contents and boxes are compared")
    arguments = parser.parse_args()
    config = digits_demo()
    rates = {"lr": arguments.lr, "backbone_lr": arguments.lr, "epochs": 12}
    config = replace(
        config,
        model=ModelConfig(
            model="dab_detr_r50", num_groups=1, num_queries=15, dropout=0.0, backbone="conv:16-32-64", **SIZES
        ),
        optimization=replace(config.optimization, **rates),
    )
    print("| " + " | ".join(HEADER) + " |")
    print("|---" * len(HEADER) + "|")
    settings = {"steps": arguments.steps, "every": arguments.every, "images": arguments.images}
    try:
        for cells in rows(arguments.original, config, **settings):
            print("| " + " | ".join(cells) + " |", flush=True)
    except ValueError as fault:
        sys.exit(f"error: {fault}")
