"""A training whose steps alone are of interest: no evaluations, no checkpoints."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..data import Batch
from ..models.detector import Detector
from ..runs.config import CocoTrainingConfig
from ..runs.loaders import evaluation_loader, evaluation_samples, evaluation_set
from ..runs.trainer import trainer_of

__all__ = ["Criterion", "Row", "train_and_measure"]

Row = dict[str, float]
Criterion = Callable[..., dict[str, Any]]


def train_and_measure(
    config: CocoTrainingConfig,
    measure: Callable[[Detector, Criterion, Sequence[Batch]], Row],
    *,
    steps: int,
    every: int,
    batches: int,
) -> Iterator[Row]:
    """Train, and measure on held images at the beginning and after every so many optimiser steps.

    Args:
        config: the training.
        measure: called with the bare model, its criterion and the held batches; leaves the model as it was.
        steps: optimiser steps; 0 to measure the model as it is.
        every: steps between two measurements.
        batches: of the evaluation set, which are held for the measurements.

    Yields:
        ``"step"`` and what ``measure`` returns.

    Raises:
        ValueError: for a model of transformers, which cannot decode one group at a time.
    """
    trainer = trainer_of(config)
    model, criterion = trainer.gradients.bare, trainer.gradients.criterion
    if not isinstance(model, Detector):
        raise ValueError(f"{config.model.model} cannot decode one group at a time, which this measurement needs")
    device = trainer.accelerator.device
    images = evaluation_loader(evaluation_samples(evaluation_set(config), config, device), config)
    held = [batch.to(device) for batch in itertools.islice(images, batches)]
    yield {"step": 0, **measure(model, criterion, held)}
    for done, step in enumerate(itertools.islice(trainer.endless_steps(), steps), start=1):
        trainer.run_step(step)
        if done % every == 0 or done == steps:
            yield {"step": done, **measure(model, criterion, held)}
