"""How far the gradients of the groups agree during a training.

Groups train the same decoder and encoder. Where their gradients point the same way, each repeats what the others say;
where they do not, the sum has something that no single group has.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..data import Batch
from ..groups import QueryGroups
from ..models.detector import Detector, in_eval_mode
from ..random_state import random_state_kept
from ..runs.config import CocoTrainingConfig
from ..runs.loaders import evaluation_loader, evaluation_set
from .steps import trainer_of

__all__ = ["gradient_agreement", "train_and_measure"]

Row = dict[str, float]


def gradient_agreement(model: Detector, criterion: Callable[..., dict[str, Tensor]], batch: Batch) -> Row:
    """The cosine between the gradients of two groups, on average over all pairs of groups.

    Every group is decoded and matched by itself, as in training, but without dropout, denoising queries and the
    statistics of the batch. Random numbers of the criterion (points of masks) are the same for every group.

    Args:
        model: a detector with at least two groups; its parameters' gradients stay as they are.
        criterion: the one that belongs to it.
        batch: images and objects, on the model's device.

    Returns:
        ``"decoder"``: of the gradients of what the decoder's groups share; ``"memory"``: of those that the encoder
        receives; ``"loss"``: the mean loss of a group.

    Raises:
        ValueError: for a single group.
    """
    config = model.config
    if config.num_groups < 2:
        raise ValueError(f"the agreement of groups needs at least 2 groups, got {config.num_groups}")
    shared = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in model.group_parameters
    ]
    decoder, memory, losses = [], [], []
    with in_eval_mode(model):
        with torch.no_grad():
            encoded, structure = pytree.tree_flatten(model.encode(batch.images, batch.masks))
        inputs = [_as_leaf(part) for part in encoded]
        leaves = [part for part in inputs if isinstance(part, Tensor) and part.requires_grad]
        for group in range(config.num_groups):
            with random_state_kept():
                output = model.decode(
                    pytree.tree_unflatten(inputs, structure), QueryGroups(1, config.num_queries), group
                )
                loss = criterion(output, batch.targets)["loss"]
            gradients = torch.autograd.grad(loss, [*shared, *leaves], allow_unused=True)
            decoder.append(_flat(gradients[: len(shared)], shared))
            memory.append(_flat(gradients[len(shared) :], leaves))
            losses.append(loss.item())
    return {
        "decoder": _mean_cosine(torch.stack(decoder)),
        "memory": _mean_cosine(torch.stack(memory)),
        "loss": sum(losses) / len(losses),
    }


def train_and_measure(
    config: CocoTrainingConfig, folder: Path, *, steps: int, every: int, batches: int
) -> Iterator[Row]:
    """Train, and measure the agreement on held images at the beginning and after every so many optimiser steps.

    Args:
        config: the training.
        folder: for its files.
        steps: optimiser steps; 0 to measure the model as it is.
        every: steps between two measurements.
        batches: of the evaluation set, over which a measurement is averaged.

    Yields:
        ``"step"`` and what :func:`gradient_agreement` returns.
    """
    trainer = trainer_of(config, folder)
    model, criterion = trainer.gradients.bare, trainer.gradients.criterion
    if not isinstance(model, Detector):
        raise ValueError(f"{config.model.model} cannot decode one group at a time, which this measurement needs")
    images = itertools.islice(evaluation_loader(evaluation_set(config), config), batches)
    held = [batch.to(trainer.accelerator.device) for batch in images]
    yield _measure(model, criterion, held, 0)
    for done, step in enumerate(itertools.islice(trainer.endless_steps(), steps), start=1):
        trainer.run_step(step)
        if done % every == 0 or done == steps:
            yield _measure(model, criterion, held, done)


def _measure(model: Detector, criterion: Callable[..., dict[str, Tensor]], held: Sequence[Batch], step: int) -> Row:
    rows = [gradient_agreement(model, criterion, batch) for batch in held]
    return {"step": step, **{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}}


def _as_leaf(part: Any) -> Any:
    return part.detach().requires_grad_() if isinstance(part, Tensor) and part.is_floating_point() else part


def _flat(gradients: Sequence[Tensor | None], of: Sequence[Tensor]) -> Tensor:
    """All gradients as one vector; what took no part counts as 0."""
    return torch.cat(
        [
            (torch.zeros_like(tensor) if gradient is None else gradient).flatten().double()
            for gradient, tensor in zip(gradients, of, strict=True)
        ]
    )


def _mean_cosine(vectors: Tensor) -> float:
    """The mean over all pairs of rows ``[K, P]``."""
    unit = F.normalize(vectors, dim=1)
    number = len(unit)
    return ((unit @ unit.T).sum() - number).item() / (number * (number - 1))
