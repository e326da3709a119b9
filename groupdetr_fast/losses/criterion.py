"""The set prediction loss over all decoder layers, images and groups at once."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..boxes import aligned_generalized_box_iou_of_centers
from ..groups import QueryGroups
from ..ops import IGNORED, NO_OBJECT
from ..targets import PackedTargets, StepTotals
from .matcher import GroupMatcher

__all__ = ["SetCriterion", "checked_class_weights", "layer_suffixes"]

_KINDS = ("loss_ce", "loss_bbox", "loss_giou")


class Predictions(Protocol):
    """What the criterion needs of a model's output; see ``models.DetectorOutput``.

    It may also have ``denoising``, as below, and ``encoder``, as ``models.EncoderOutput``.
    """

    logits: Tensor  # [layers, B, K * N, C]
    boxes: Tensor  # [layers, B, K * N, 4]
    groups: QueryGroups


class DenoisingQueries(Protocol):
    """What the criterion needs to know of denoising queries; see ``layers.denoising``."""

    target: Tensor  # [B, D] int64
    positive: Tensor  # [B, D] bool
    negative: Tensor  # [B, D] bool
    groups: QueryGroups


class DenoisingPredictions(Protocol):
    """Their predictions; see ``models.DenoisingOutput``."""

    logits: Tensor  # [layers, B, D, C]
    boxes: Tensor  # [layers, B, D, 4]
    queries: DenoisingQueries


class SetCriterion(nn.Module):
    """Sigmoid focal loss, L1 loss and generalised IoU loss of the matched boxes.

    Each group is matched one-to-one and the loss is the mean over groups (Group DETR, section 3.2): sums are divided by
    K times the number of boxes, which is averaged over processes and at least 1, as in the original repositories (that
    of Group DETR takes their product for at least 1, so that in steps with less than one object a process K groups
    weigh up to K times as much as one). The encoder's predictions of two-stage detectors are matched and weighted as
    those of one more layer. Denoising queries are not matched, since each knows its object; their sums are divided by
    the number of denoising groups, over all sets, times the number of boxes (DINO's repository; DN-DETR's does not
    average that number over processes).

    All layers, images and groups take part in one call of each op, every tensor has a shape that the host knows, and
    nothing waits for the device.

    Args:
        matcher: matches queries to targets.
        class_loss, l1_loss, giou_loss: weights of the three losses in the total.
        alpha, gamma: of the focal loss.
        class_weights: ``[C]``, by which the class loss of a query is multiplied if its object is of that class, in all
            its classes (Cui et al. 2019, section 4.3); queries without an object count once. None: all count once.

    Raises:
        ValueError: for class weights that are not positive numbers.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        matcher: GroupMatcher,
        *,
        class_loss: float = 2.0,
        l1_loss: float = 5.0,
        giou_loss: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.register_buffer("class_weights", checked_class_weights(class_weights), persistent=False)
        self.matcher = matcher
        self.weights: Mapping[str, float] = {"loss_ce": class_loss, "loss_bbox": l1_loss, "loss_giou": giou_loss}
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, out: Predictions, targets: PackedTargets, totals: StepTotals | None = None) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            out: predictions of all layers; read are ``logits``, ``boxes`` and ``groups``, and, where it has them,
                ``denoising`` and ``encoder``.
            targets: of the same images, on the same device; those that the denoising queries were made from.
            totals: of the step that this call is a part of; None: it is the whole step.

        Returns:
            Scalars under DETR's names, unweighted: ``loss_ce``, ``loss_bbox`` and ``loss_giou`` of the last layer, with
            ``_0``, ``_1``, ... appended for the other layers, with ``_enc`` for the encoder, and with ``_dn``,
            ``_dn_0``, ``_dn_1``, ... for the denoising queries; and ``loss``, the weighted sum of all.

        Raises:
            TypeError: if ``out`` has no logits, boxes or groups, or the targets are not packed.
            ValueError: if a shape, a device or a label does not fit.
        """
        _check_predictions(out)
        totals = StepTotals.of([targets]) if totals is None else totals
        num_groups = totals.num_groups or out.groups.num_groups
        num_boxes = totals.num_objects * (num_groups / out.groups.num_groups)  # the mean is over all groups
        encoder, denoising = getattr(out, "encoder", None), getattr(out, "denoising", None)
        logits, boxes, suffixes = out.logits, out.boxes, layer_suffixes(len(out.logits))
        if encoder is not None:
            logits, boxes = torch.cat((logits, encoder.logits[None])), torch.cat((boxes, encoder.boxes[None]))
            suffixes.append("_enc")
        parts = [(suffixes, self._matched_losses(logits, boxes, targets, out.groups, num_boxes))]
        if denoising is not None:
            suffixes = [f"_dn{suffix}" for suffix in layer_suffixes(len(denoising.logits))]
            layout = replace(denoising.queries.groups, num_groups=num_groups)
            normalizer = totals.num_objects * (layout.denoising_sets * layout.denoising_groups)
            parts.append((suffixes, self._denoising_losses(denoising, targets, normalizer)))
        losses: dict[str, Tensor] = {}
        for suffixes, per_layer in parts:
            for name, values in zip(_KINDS, per_layer.unbind(), strict=True):
                for suffix, value in zip(suffixes, values.unbind(), strict=True):
                    losses[name + suffix] = value
        sums = (zip(_KINDS, per_layer.sum(1).unbind(), strict=True) for _, per_layer in parts)
        losses["loss"] = functools.reduce(torch.add, (self.weights[name] * value for name, value in chain(*sums)))
        return losses

    def _matched_losses(
        self, logits: Tensor, boxes: Tensor, targets: PackedTargets, groups: QueryGroups, num_boxes: Tensor
    ) -> Tensor:
        """Losses of matched queries, ``[3, layers]``."""
        matching = self.matcher(logits.detach(), boxes.detach(), targets, groups)
        target_class = matching.classes(targets, logits.shape[2], NO_OBJECT)  # [layers, B, K * N]
        predicted = boxes.gather(2, matching.queries[..., None].expand(-1, -1, -1, 4))  # [layers, B, K * T, 4]
        expected = targets.boxes.repeat(1, matching.positives, 1)
        normalizer = num_boxes * matching.positives
        losses = self._losses(logits, target_class, predicted, expected, matching.matched, normalizer)
        if self.class_weights is not None:
            rows = logits.gather(2, matching.queries[..., None].expand(-1, -1, -1, logits.shape[3]))
            labels = targets.labels.repeat(1, matching.positives).where(matching.matched, IGNORED)
            losses = _with_class_loss(losses, self._weight_of_classes(rows, labels) / normalizer)
        return losses

    def _denoising_losses(self, denoising: DenoisingPredictions, targets: PackedTargets, normalizer: Tensor) -> Tensor:
        """Losses of denoising queries, ``[3, layers]``."""
        queries = denoising.queries
        labels = targets.labels.gather(1, queries.target)  # [B, D]
        without_object = torch.where(queries.negative, NO_OBJECT, IGNORED)
        expected = targets.boxes.gather(1, queries.target[..., None].expand(-1, -1, 4))
        losses = self._losses(
            denoising.logits,
            labels.where(queries.positive, without_object),
            denoising.boxes,
            expected,
            queries.positive,
            normalizer,
        )
        if self.class_weights is not None:
            weighted = self._weight_of_classes(denoising.logits, labels.where(queries.positive, IGNORED))
            losses = _with_class_loss(losses, weighted / normalizer)
        return losses

    def _weight_of_classes(self, logits: Tensor, target_class: Tensor) -> Tensor:
        """What class weights add to the class loss of every layer, ``[layers]``.

        The loss of all queries is one sum, in which each counts once. Of those with an object, which are few, it is
        computed once more, query by query, for what their weights exceed 1 by.

        Args:
            logits: ``[layers, B, M, C]``, of the queries with an object.
            target_class: ``[layers, B, M]`` or ``[B, M]`` int64: the class of the object, or ``IGNORED``.
        """
        assert self.class_weights is not None
        target_class = target_class.expand(logits.shape[:-1])
        each = ops.sigmoid_focal_loss(
            logits.unsqueeze(-2), target_class.unsqueeze(-1), alpha=self.alpha, gamma=self.gamma
        )  # [layers, B, M]
        excess = self.class_weights.to(each.dtype)[target_class.clamp(min=0)] - 1
        return (excess * each).flatten(1).sum(1)

    def _losses(
        self,
        logits: Tensor,
        target_class: Tensor,
        predicted: Tensor,
        expected: Tensor,
        counted: Tensor,
        normalizer: Tensor,
    ) -> Tensor:
        """The three losses of every layer, ``[3, layers]`` in the order of ``_KINDS``.

        Args:
            logits: ``[layers, B, Q, C]``.
            target_class: ``[layers, B, Q]`` or ``[B, Q]`` int64: a class, ``NO_OBJECT`` or ``IGNORED``.
            predicted: ``[layers, B, M, 4]``.
            expected: ``[B, M, 4]``.
            counted: ``[..., B, M]`` bool, the pairs of boxes that count.
            normalizer: what the sums are divided by.
        """
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        box_losses = torch.stack(self._box_losses(predicted, expected.to(predicted.dtype)))  # [2, layers, B, M]
        target_class = target_class.expand(logits.shape[:-1])
        class_loss = ops.sigmoid_focal_loss(logits, target_class, alpha=self.alpha, gamma=self.gamma)  # [layers, B]
        box_sums = box_losses.where(counted, 0).flatten(2).sum(2)  # [2, layers]
        return torch.cat((class_loss.sum(1)[None], box_sums)) / normalizer

    @staticmethod
    def _box_losses(predicted: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """L1 and generalised IoU loss of corresponding ``cxcywh`` boxes ``[..., 4]``: two of ``[...]``."""
        l1 = (predicted - expected).abs().sum(-1)
        return l1, 1 - aligned_generalized_box_iou_of_centers(predicted, expected)


def _check_predictions(out: object) -> None:
    """Check that an output has what the criterion needs."""
    if not isinstance(getattr(out, "groups", None), QueryGroups) or not hasattr(out, "boxes"):
        raise TypeError(
            "out must have logits, boxes and groups, as gd.DetectorOutput(logits, boxes, gd.QueryGroups(K, N)) has, "
            f"got a {type(out).__name__}; dictionaries of DETR's kind are for integrations.detr.SetCriterion"
        )
    if out.logits.dim() != 4:  # type: ignore[attr-defined]
        raise ValueError(f"logits must have shape [layers, B, K * N, C], got {list(out.logits.shape)}")  # type: ignore[attr-defined]


def _with_class_loss(losses: Tensor, more: Tensor) -> Tensor:
    """Losses ``[3, layers]`` in the order of ``_KINDS``, with ``[layers]`` added to the class loss."""
    return torch.cat((losses[:1] + more, losses[1:]))


def checked_class_weights(weights: Sequence[float] | None) -> Tensor | None:
    """Weights of classes as float32 ``[C]``.

    Raises:
        ValueError: if one is not a positive number.
    """
    if weights is None:
        return None
    if not all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights):
        raise ValueError(f"class_weights must be a list of positive numbers, one for each class, got {list(weights)}")
    return torch.tensor(weights, dtype=torch.float32)


def layer_suffixes(layers: int) -> list[str]:
    """What is appended to a loss's name for each layer: nothing for the last one."""
    return [f"_{layer}" for layer in range(layers - 1)] + [""]
