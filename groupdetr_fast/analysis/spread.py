"""How much the queries of a detector differ, and how much they say of the image, during a training.

A DETR's queries start alike, and for some time each predicts the same box whatever the image shows: the average object
near its anchor. The training leaves that plateau once the queries' contents differ, from one query to the next and from
one image to the next.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
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
        (root mean squares). ``"box_queries"`` and ``"box_images"``: how far the four numbers of the last layer's boxes
        lie from their mean over the queries of an image, and from their mean over the images of a query, relative to
        the image (root mean square).

    Raises:
        ValueError: for a detector that predicts masks instead of boxes.
    """
    losses, contents, boxes = [], [], []
    layers: Any = model.get_submodule("decoder.layers")
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training]
    with in_eval_mode(model), _statistics_of_the_batch(norms):
        for batch in held:
            with _outputs_kept(layers[0], layers[-1]) as kept:
                output = model(batch.images, batch.masks)
            if not isinstance(output, DetectorOutput):
                raise ValueError(f"{type(model).__name__} predicts no boxes, whose spread is measured")
            losses.append(criterion(output, batch.targets)["loss"].item())
            contents.append(torch.stack(kept).float())
            boxes.append(output.boxes[-1].float())
    first, last = torch.cat(contents, dim=1)  # each [images, queries, d]
    box = torch.cat(boxes)  # [images, queries, 4]
    return {
        "loss": sum(losses) / len(losses),
        "content_first": (_deviation(first, 1) / first.square().mean().sqrt()).item(),
        "content_last": (_deviation(last, 1) / last.square().mean().sqrt()).item(),
        "box_queries": _deviation(box, 1).item(),
        "box_images": _deviation(box, 0).item(),
    }


def _deviation(x: Tensor, dim: int) -> Tensor:
    """Root mean square of the distance from the mean over ``dim``."""
    return (x - x.mean(dim, keepdim=True)).square().mean().sqrt()


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
