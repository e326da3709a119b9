"""How much the queries of a detector differ, and how much they say of the image, during a training.

A DETR first learns the average object: each query predicts the same box near its anchor, whatever the image shows. The
training leaves that plateau once the contents of a query differ from one image to the next, and its boxes with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..data import Batch
from ..groups import QueryGroups
from ..models.detector import Detector, in_eval_mode
from ..models.output import DetectorOutput
from .steps import Criterion, Row

__all__ = ["spread_of_queries"]


@torch.no_grad()
def spread_of_queries(model: Detector, criterion: Criterion, held: Sequence[Batch]) -> Row:
    """By how much the contents and boxes of the queries of group 0 differ.

    Without dropout, but batch norms that are trained normalise by the statistics of each batch, as in training: those
    that they have gathered mean nothing at its beginning. The model stays as it was, running statistics included.

    Args:
        model: a detector of boxes.
        criterion: the one that belongs to it.
        held: batches of images and objects, on the model's device.

    Returns:
        ``"loss"``: the mean over batches. ``"content_first"`` and ``"content_last"``: how far the contents after the
        first and the last decoder layer lie from the mean over the queries of their image, relative to their length
        (root mean squares); ``"content_images"``: how far those after the last layer lie from the mean over the images
        of their query; ``"memory_images"``: how far the tokens of the encoder lie from the mean over the images of
        their batch, at their place. ``"box_queries"`` and ``"box_images"``: how far the four numbers of the last
        layer's boxes lie from their mean over the queries of an image, and from their mean over the images of a query,
        relative to the image (root mean square).

    Raises:
        ValueError: for a detector that predicts masks instead of boxes.
    """
    losses, memories, contents, boxes = [], [], [], []
    layers: Any = model.get_submodule("decoder.layers")
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training]
    with in_eval_mode(model), _statistics_of_the_batch(norms):
        for batch in held:
            memory = model.encode(batch.images, batch.masks)
            with _outputs_kept(layers[0], layers[-1]) as kept:
                output = model.decode(memory, QueryGroups(1, model.config.num_queries))
            if not isinstance(output, DetectorOutput):
                raise ValueError(f"{type(model).__name__} predicts no boxes, whose spread is measured")
            losses.append(criterion(output, batch.targets)["loss"].item())
            memories.append(_spread(pytree.tree_leaves(memory)[0].float(), 0))  # tokens come first in all detectors
            contents.append(torch.stack(kept).float())
            boxes.append(output.boxes[-1].float())
    first, last = torch.cat(contents, dim=1)  # each [images, queries, d]
    box = torch.cat(boxes)  # [images, queries, 4]
    return {
        "loss": sum(losses) / len(losses),
        "memory_images": sum(memories) / len(memories),
        "content_first": _spread(first, 1),
        "content_last": _spread(last, 1),
        "content_images": _spread(last, 0),
        "box_queries": _deviation(box, 1),
        "box_images": _deviation(box, 0),
    }


def _deviation(x: Tensor, dim: int) -> float:
    """Root mean square of the distance from the mean over ``dim``."""
    return (x - x.mean(dim, keepdim=True)).square().mean().sqrt().item()


def _spread(x: Tensor, dim: int) -> float:
    """The same relative to the root mean square of ``x``."""
    return _deviation(x, dim) / x.square().mean().sqrt().item()


@contextmanager
def _outputs_kept(*layers: nn.Module) -> Iterator[list[Tensor]]:
    """What each of the layers returns inside, in the order of their calls."""
    kept: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, output: kept.append(output)) for layer in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _statistics_of_the_batch(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, batch norms are in training mode; afterwards in evaluation mode, with the statistics of before."""
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
