"""Denoising queries (DN-DETR, section 4) and contrastive denoising queries (DINO, section 3.3).

A denoising query is made from an object of the ground truth, by noise on its class and its box, and must predict that
object again: no matching is needed. Each object appears once in every denoising group (contrastive: also once as a
negative, whose box has more noise and which must predict that there is nothing). Every denoising group has room for as
many objects as the fullest image of the batch has; what an image does not fill is padding.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from ..groups import QueryGroups
from ..targets import PackedTargets
from .mlp import ANCHOR_EPS, inverse_sigmoid

__all__ = ["DenoisingQueries", "make_denoising_queries"]


@dataclass(frozen=True)
class DenoisingQueries:
    """The D denoising queries of each image, set by set, denoising group by denoising group.

    Attributes:
        labels: ``[B, D]`` int64, class with noise; 0 on padding.
        boxes: ``[B, D, 4]`` ``cxcywh`` in [0, 1], with noise; the middle half of the image on padding.
        exists: ``[B, D]`` bool, False on padding.
        target: ``[B, D]`` int64, row of the object in the packed targets.
        positive: ``[B, D]`` bool, True where the query must predict its object's class and box.
        negative: ``[B, D]`` bool, True where it must predict no class. What is neither has no loss.
        groups: the layout of the whole sequence: these queries, then the matching queries.
    """

    labels: Tensor
    boxes: Tensor
    exists: Tensor
    target: Tensor
    positive: Tensor
    negative: Tensor
    groups: QueryGroups

    @property
    def anchors(self) -> Tensor:
        """``[B, D, 4]``: the boxes before the sigmoid, in which form decoders take their anchors."""
        return inverse_sigmoid(self.boxes, ANCHOR_EPS)

    def content(self, label_embedding: nn.Embedding) -> Tensor:
        """``[B, D, d]``: the embedding of the labels, 0 on padding."""
        return label_embedding(self.labels) * self.exists[..., None]


def make_denoising_queries(
    targets: PackedTargets,
    groups: QueryGroups,
    *,
    num_classes: int,
    number: int,
    label_noise: float,
    box_noise: float,
    contrastive: bool = False,
    scope: str = "first",
) -> DenoisingQueries | None:
    """Make the denoising queries of one training step.

    The sampling is that of the original repositories. Shapes follow from host-side numbers alone and nothing waits for
    the device. Random numbers come from torch's default generator of the targets' device.

    Args:
        targets: the ground truth of the batch.
        groups: how the matching queries fall into groups.
        num_classes: C; random labels are drawn from 0 ... C - 1.
        number: positive denoising queries of one set (both repositories' ``dn_number``): a set has as many denoising
            groups as fit for the fullest image of the batch (or for the room that targets padded further have, as
            with CUDA graphs), and at least one. 0 for no denoising.
        label_noise: probability that a label is replaced by a random one, which may be the same.
        box_noise: share of a box's size. DN-DETR moves the centre by up to half of it and changes the size by up to it;
            DINO (``contrastive``) moves each side by up to half of it, those of negatives once to twice as far.
        contrastive: in each denoising group, follow the positives by as many negatives. As in DINO's repository,
            padding then counts as negative too; without negatives, padding has no loss, as in DN-DETR's.
        scope: ``"first"`` makes one set, for query group 0; ``"every"`` one for each query group.

    Returns:
        The queries; None if the batch has no objects or ``number`` is 0. Parameters that only denoising queries use
        then get no gradient, which DistributedDataParallel rejects.

    Raises:
        ValueError: for a label that is not among the classes, where the labels are known on the host.
    """
    if (size := targets.max_targets) == 0 or number == 0:
        return None
    targets.check_labels(num_classes)  # beyond which the embedding of labels has no row
    layout = _layout(groups, max(1, number // size), 2 * size if contrastive else size, scope)
    index, repeats = torch.arange(layout.denoising_length, device=targets.device), layout.denoising_length // size
    exists, labels = (each.repeat(1, repeats) for each in (targets.valid, targets.labels))
    boxes = targets.boxes.repeat(1, repeats, 1)
    positive, negative = exists, torch.zeros_like(exists)
    if contrastive:
        second = index // size % 2 == 1  # [D], the negative half of each denoising group
        positive, negative = exists & ~second, ~exists | second
    boxes = _move_sides(boxes, box_noise, second) if contrastive else _move_and_resize(boxes, box_noise)
    replaced = torch.rand(labels.shape, device=labels.device) < label_noise
    return DenoisingQueries(
        labels=torch.where(replaced, torch.randint_like(labels, num_classes), labels).where(exists, 0),
        boxes=boxes.where(exists[..., None], 0.5),
        exists=exists,
        target=(index % size).expand(targets.batch_size, -1),
        positive=positive,
        negative=negative,
        groups=layout,
    )


def _layout(groups: QueryGroups, denoising_groups: int, size: int, scope: str) -> QueryGroups:
    """The groups with so many denoising groups of a size before them."""
    return replace(groups, denoising_groups=denoising_groups, queries_per_denoising_group=size, denoising_scope=scope)


def _move_and_resize(boxes: Tensor, noise: float) -> Tensor:
    """DN-DETR's noise on ``cxcywh`` boxes."""
    size = boxes[..., 2:]
    reach = torch.cat((size / 2, size), dim=-1)
    return (boxes + (2 * torch.rand_like(boxes) - 1) * reach * noise).clamp(0, 1)


def _move_sides(boxes: Tensor, noise: float, more: Tensor) -> Tensor:
    """DINO's noise on ``cxcywh`` boxes ``[B, D, 4]``; where ``more`` ``[D]``, each side moves once to twice as far."""
    reach = boxes[..., 2:].repeat(1, 1, 2) / 2
    sign = 2 * torch.randint_like(boxes, 2) - 1
    amount = sign * (torch.rand_like(boxes) + more[:, None])
    moved = (cxcywh_to_xyxy(boxes) + amount * reach * noise).clamp(0, 1)
    return xyxy_to_cxcywh(moved).clamp(min=0)  # much noise lets sides cross
