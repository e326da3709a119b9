"""Ultralytics' matching and losses of RT-DETR, for all layers and images at once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from ultralytics.models.utils.loss import DETRLoss, RTDETRDetectionLoss
from ultralytics.models.utils.ops import HungarianMatcher
from ultralytics.nn.tasks import RTDETRDetectionModel
from ultralytics.utils.loss import FocalLoss, VarifocalLoss

from ... import ops
from ...groups import QueryGroups
from ...losses.matcher import GroupMatcher
from ...ops import NO_OBJECT
from ...targets import PackedTargets, tensor_on
from ..detr import sum_counted
from ..kernels import serves
from .exchange import SavedAsTheirs, set_class

__all__ = ["AcceleratedModel", "exchange", "is_exchanged", "put_back"]

_ADDED_AREA = 1e-7  # which Ultralytics adds to the union and to the hull of two boxes before it divides by them
NOT_IN_GROUPS = (
    "groups of queries need the criterion as Ultralytics' RT-DETR has it, with use_vfl, aux_loss, no use_uni_match, and"
    " no subclass or hook in it: this one would match all groups as one, so leave it as it is or train with one group"
)
_KINDS = ("class", "bbox", "giou")

Indices = Sequence[tuple[Tensor, Tensor]]  # of each image: rows of queries, rows of all objects of the batch


def exchange(module: nn.Module) -> bool:
    """Let a module compute as below, in place, if it is Ultralytics' RT-DETR or its criterion; whether it does now."""
    if type(module) in _OURS:
        set_class(module, _OURS[type(module)])
    return is_exchanged(module)


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange`."""
    if is_exchanged(module):
        set_class(module, type(module).theirs)


def is_exchanged(module: nn.Module) -> bool:
    return type(module) in _OURS.values()


class AcceleratedModel(SavedAsTheirs, RTDETRDetectionModel):
    """Makes its criterion with the first loss."""

    theirs = RTDETRDetectionModel

    def init_criterion(self) -> nn.Module:
        criterion = super().init_criterion()
        exchange(criterion)
        return criterion


class _Pairs(NamedTuple):
    """Which query is compared with which object; M of them in each image, some of which do not count.

    Attributes:
        queries: ``[..., B, M]`` int64, rows of queries, of one layer or of all.
        counted: ``[..., B, M]`` bool.
        labels: ``[B, M]`` int64.
        boxes: ``[B, M, 4]``.
        number: how many count, in one layer.
        divisor: of the sums over them, so that losses are means over objects and groups.
    """

    queries: Tensor
    counted: Tensor
    labels: Tensor
    boxes: Tensor
    number: int
    divisor: int


class _Layers(DETRLoss):
    """The losses of one kind of queries, which Ultralytics' criterion asks for twice: matched and denoising ones.

    Attributes:
        num_groups: K, groups of the queries that are matched, in training mode; in evaluation mode there is one. Each
            is matched on its own, and losses are averaged over them.
    """

    num_groups = 1

    def forward(
        self,
        pred_bboxes: Tensor,
        pred_scores: Tensor,
        batch: Mapping[str, Any],
        postfix: str = "",
        match_indices: Indices | None = None,
    ) -> dict[str, Tensor]:
        """The losses of the last layer by name, and the sums over the others.

        Args:
            pred_bboxes: ``[layers, B, Q, 4]``, ``cxcywh`` in [0, 1].
            pred_scores: ``[layers, B, Q, C]`` logits.
            batch: ``cls`` ``[T]`` and ``bboxes`` ``[T, 4]`` of all images, and ``gt_groups``, how many each has.
            postfix: of the names.
            match_indices: pairs that are known, of denoising queries; None: they are matched.

        Raises:
            ValueError: if there are several groups, and Ultralytics' own code would have to match them.
        """
        several = self.training and self.num_groups > 1
        is_ours = self._is_as_rtdetr_has_it()
        if several and not is_ours:
            raise ValueError(NOT_IN_GROUPS)
        if not several and not (is_ours and serves("linear_assignment", pred_bboxes.device)):
            return super().forward(pred_bboxes, pred_scores, batch, postfix=postfix, match_indices=match_indices)
        self.device = pred_bboxes.device  # which Ultralytics reads
        boxes = pred_bboxes.to(torch.promote_types(pred_bboxes.dtype, torch.float32))
        if match_indices is None:
            pairs = self._match(boxes.detach(), pred_scores.detach(), batch)
        else:
            pairs = _given(match_indices, batch, boxes.device)
        per_layer = self._losses(boxes, pred_scores, pairs)
        losses = {f"loss_{kind}{postfix}": loss for kind, loss in zip(_KINDS, per_layer[:, -1].unbind(), strict=True)}
        sums = per_layer[:, :-1].sum(1)
        return losses | {f"loss_{kind}_aux{postfix}": loss for kind, loss in zip(_KINDS, sums.unbind(), strict=True)}

    def _is_as_rtdetr_has_it(self) -> bool:
        """Whether the options ask for nothing but what is computed here."""
        parts = (self.matcher, self.fl, self.vfl)
        return (
            [type(part) for part in parts] == [HungarianMatcher, FocalLoss, VarifocalLoss]
            and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
            and self.matcher.use_fl
            and self.aux_loss
            and not self.use_uni_match
        )

    def _match(self, boxes: Tensor, logits: Tensor, batch: Mapping[str, Any]) -> _Pairs:
        """The pairs that cost least, in every layer."""
        targets = _pack(batch, boxes.device)
        cost = self.matcher.cost_gain
        match = GroupMatcher(
            class_cost=cost["class"],
            l1_cost=cost["bbox"],
            giou_cost=cost["giou"],
            alpha=self.matcher.alpha,
            gamma=self.matcher.gamma,
        )
        num_groups = self.num_groups if self.training else 1
        groups = QueryGroups(num_groups, logits.shape[2] // num_groups)
        matching = match(logits, boxes, targets, groups)
        labels, expected = targets.labels.repeat(1, num_groups), targets.boxes.repeat(1, num_groups, 1)
        number = sum(min(size, groups.queries_per_group) for size in targets.sizes)
        return _Pairs(
            matching.queries, matching.matched, labels, expected, number * num_groups, max(number, 1) * num_groups
        )

    def _losses(self, boxes: Tensor, logits: Tensor, pairs: _Pairs) -> Tensor:
        """The losses of every layer, weighted, ``[3, layers]`` in the order of ``_KINDS``."""
        layers = len(boxes)
        queries, counted = (x.expand(layers, *x.shape[-2:]) for x in (pairs.queries, pairs.counted))
        predicted = boxes.gather(2, queries[..., None].expand(-1, -1, -1, 4))  # [layers, B, M, 4]
        iou, giou = _overlaps(predicted, pairs.boxes)
        class_loss = self._class_loss(logits, queries, counted, iou.detach(), pairs)
        l1_loss = sum_counted((predicted - pairs.boxes).abs().sum(-1), counted)
        giou_loss = sum_counted(1 - giou, counted)
        each = zip(_KINDS, (class_loss, l1_loss, giou_loss), strict=True)
        return torch.stack([self.loss_gain[kind] * loss for kind, loss in each]) / pairs.divisor

    def _class_loss(self, logits: Tensor, queries: Tensor, counted: Tensor, iou: Tensor, pairs: _Pairs) -> Tensor:
        """The varifocal loss of each layer, summed, ``[layers]``; without any object it is Ultralytics' focal loss.

        A matched query's own class has the cross-entropy with its IoU, times its IoU; every other entry counts as one
        that is absent in a focal loss.
        """
        label_of_query = (pairs.labels - NO_OBJECT).expand_as(queries).where(counted, 0)
        classes = queries.new_full(logits.shape[:3], NO_OBJECT).scatter_add(2, queries, label_of_query)
        if pairs.number == 0:
            losses = ops.sigmoid_focal_loss(logits, classes, alpha=float(self.fl.alpha), gamma=self.fl.gamma)
            return losses.sum(1)
        others = ops.sigmoid_focal_loss(logits, classes, alpha=0.0, gamma=self.vfl.gamma).sum(1)
        own = logits.flatten(2).gather(2, queries * logits.shape[3] + pairs.labels).to(iou.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(own, iou, reduction="none")
        return self.vfl.alpha * others + sum_counted(iou * cross_entropy, counted)


class _Criterion(SavedAsTheirs, RTDETRDetectionLoss, _Layers):
    """Their own criterion, which finds :class:`_Layers` where it looks for the losses of its layers."""

    theirs = RTDETRDetectionLoss


_OURS = {cls.theirs: cls for cls in (AcceleratedModel, _Criterion)}


def _pack(batch: Mapping[str, Any], device: torch.device) -> PackedTargets:
    sizes = tuple(batch["gt_groups"])
    rows = torch.arange(sum(sizes)).split(sizes)
    labels, boxes, _ = _objects(rows, batch, device)
    largest = int(labels.max()) if device.type == "cpu" and labels.numel() else None
    return PackedTargets(labels, boxes, tensor_on(sizes, device), sizes, largest_label=largest)


def _given(match_indices: Indices, batch: Mapping[str, Any], device: torch.device) -> _Pairs:
    """Pairs that are known on the host."""
    queries = pad_sequence([queries for queries, _ in match_indices], batch_first=True)
    labels, boxes, counted = _objects([rows for _, rows in match_indices], batch, device)
    number = sum(len(queries) for queries, _ in match_indices)
    return _Pairs(_to(queries, device), counted, labels, boxes, number, max(number, 1))


def _objects(rows: Sequence[Tensor], batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Labels ``[B, M]`` and boxes ``[B, M, 4]`` of the objects in some rows, by image, and which are no padding.

    Args:
        rows: of each image, on the CPU.
    """
    padded = _to(pad_sequence(list(rows), batch_first=True, padding_value=-1), device)
    counted = padded >= 0
    labels, boxes = (batch[name][padded.clamp(min=0)] for name in ("cls", "bboxes"))
    return labels.where(counted, 0), boxes.where(counted[..., None], 0), counted


def _to(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on a device; pinned towards a GPU, since the host would wait for a copy from other memory."""
    pinned = device.type == "cuda"
    return (rows.pin_memory() if pinned else rows).to(device, non_blocking=pinned)


def _overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of corresponding ``cxcywh`` boxes (broadcast), areas enlarged as in Ultralytics."""
    (low, high), (other_low, other_high) = (
        (box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2) for box in (first, second)
    )
    intersection = _area((high.minimum(other_high) - low.maximum(other_low)).clamp(min=0))
    union = _area(first[..., 2:]) + _area(second[..., 2:]) - intersection + _ADDED_AREA
    hull = _area(high.maximum(other_high) - low.minimum(other_low)) + _ADDED_AREA
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def _area(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)  # the backward pass of prod() would wait for a GPU
    return width * height
