"""A matcher and a criterion for the training scripts of the DETR family: their signatures, names and results.

They stand in for ``HungarianMatcher`` and ``SetCriterion`` of Conditional DETR, Group DETR, LW-DETR and RF-DETR, which
match layer by layer, group by group and image by image on the host. Here every op is called once for all of them.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..boxes import aligned_generalized_box_iou, box_area, cxcywh_to_xyxy
from ..groups import QueryGroups
from ..losses.matcher import GroupMatcher, Matching
from ..targets import PackedTargets

__all__ = ["HungarianMatcher", "SetCriterion", "sum_counted"]

_GAMMA = 2.0  # of the focal loss; fixed in the whole family
_LEAST_QUALITY = 0.01  # lower bound of the IoU-aware target; LW-DETR, models/lwdetr.py
_LOSSES = ("labels", "boxes", "cardinality")

Target = Mapping[str, Tensor]


class HungarianMatcher(nn.Module):
    """Matches every group of queries one-to-one to the targets of its image.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the focal, L1 and generalised IoU cost.
        focal_alpha: alpha of the focal cost, as in RF-DETR. The other repositories take 0.25 whatever this says.
        unsupported: further options of the family, such as those for masks and keypoints; only their "off" values
            (None, 0, False, empty) are taken.

    Raises:
        ValueError: if all costs are 0 or an unsupported option is on.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        focal_alpha: float = 0.25,
        **unsupported: Any,
    ):
        super().__init__()
        _refuse("HungarianMatcher", unsupported)
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou must not all be 0")
        self.match = GroupMatcher(
            class_cost=cost_class, l1_cost=cost_bbox, giou_cost=cost_giou, alpha=focal_alpha, gamma=_GAMMA
        )

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Target], group_detr: int = 1
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one layer's predictions; the device is waited for once, to bring the result to the host.

        Args:
            outputs: ``pred_logits`` ``[B, K * N, C]`` and ``pred_boxes`` ``[B, K * N, 4]``, ``cxcywh`` in [0, 1].
            targets: ``labels`` ``[T_b]`` and ``boxes`` ``[T_b, 4]`` of each image.
            group_detr: K.

        Returns:
            For each image the matched queries, ascending, and the target of each: int64 on the CPU, of length
            ``K * min(N, T_b)``.

        Raises:
            TypeError: if ``outputs`` or the targets are not of these kinds.
            ValueError: if ``group_detr`` does not divide the number of queries, or targets do not fit.
        """
        _check_outputs({"": outputs})
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        packed = _pack(targets)
        matching = self.match(logits, boxes, packed, _split(logits.shape[1], group_detr))
        indices = []
        for row in torch.where(matching.matched, matching.queries, -1).cpu():  # [K * T_max] of each image
            rank = row.argsort(stable=True)
            rank = rank[row[rank] >= 0]
            indices.append((row[rank], rank % max(packed.max_targets, 1)))
        return indices


class SetCriterion(nn.Module):
    """The losses of all layers, under the family's names, unweighted.

    Sums over matched queries are divided by K times the number of boxes, averaged over processes, at least 1. All
    layers, the encoder's included, are matched together and no value is read back from the device.

    Args:
        num_classes: only kept, as in the family; the number of classes is read from the logits.
        matcher: a :class:`HungarianMatcher` of this module.
        weight_dict: kept for the training script, which weights and sums the losses itself.
        positional: none; what follows has a different order in each repository, and is to be given by name.
        focal_alpha: alpha of the focal loss, or the exponent of the score in ``ia_bce_loss``.
        losses: any of ``"labels"``, ``"boxes"`` and ``"cardinality"``.
        group_detr: K, groups in training mode. In evaluation mode there is one group.
        sum_group_losses: divide by the number of boxes only, so that the losses of groups are summed, not averaged.
        use_varifocal_loss, use_position_supervised_loss: not supported; must be False.
        ia_bce_loss: the IoU-aware cross-entropy of LW-DETR and RF-DETR in place of the focal loss.
        unsupported: further options of the family; only their "off" values (None, 0, False, empty) are taken.

    Raises:
        TypeError: if ``matcher`` is not a :class:`HungarianMatcher` of this module, or for a fourth positional one.
        ValueError: if an unsupported option is on, ``losses`` has an unknown name or ``group_detr`` is no positive
            integer.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: Mapping[str, float],
        *positional: Any,
        focal_alpha: float = 0.25,
        losses: Sequence[str] = _LOSSES,
        group_detr: int = 1,
        sum_group_losses: bool = False,
        use_varifocal_loss: bool = False,
        use_position_supervised_loss: bool = False,
        ia_bce_loss: bool = False,
        **unsupported: Any,
    ):
        super().__init__()
        if positional:
            raise TypeError(
                "SetCriterion takes what follows weight_dict by name: in fourth place DETR has eos_coef, of a softmax "
                "loss that is not supported, Deformable DETR losses, and Conditional DETR focal_alpha; "
                f"got {reprlib.repr(positional[0])}"
            )
        unsupported["use_varifocal_loss"] = use_varifocal_loss
        unsupported["use_position_supervised_loss"] = use_position_supervised_loss
        _refuse("SetCriterion", unsupported)
        if not isinstance(matcher, HungarianMatcher):
            found = f"{type(matcher).__module__}.{type(matcher).__name__}"
            raise TypeError(f"matcher must be a HungarianMatcher of {__name__}, got {found}")
        if unknown := sorted(set(losses) - set(_LOSSES)):
            raise ValueError(f"losses must be among {', '.join(_LOSSES)}, got {', '.join(unknown)}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.focal_alpha = focal_alpha
        self.losses = tuple(losses)
        self.group_detr = _checked_groups(group_detr)
        self.sum_group_losses = sum_group_losses
        self.ia_bce_loss = ia_bce_loss

    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Target], num_boxes: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            outputs: ``pred_logits`` ``[B, K * N, C]`` and ``pred_boxes`` ``[B, K * N, 4]``, ``cxcywh`` in [0, 1], of
                the last layer; ``aux_outputs``, a list of such mappings of the layers before it, and ``enc_outputs``,
                such a mapping of the encoder, where there are any.
            targets: ``labels`` ``[T_b]`` and ``boxes`` ``[T_b, 4]`` of each image.
            num_boxes: what sums are divided by, in place of :meth:`num_boxes_for_targets`, as in RF-DETR.

        Returns:
            Scalars ``loss_ce`` and ``class_error`` (for "labels"), ``loss_bbox`` and ``loss_giou`` (for "boxes"), and
            ``cardinality_error`` (for "cardinality") of the last layer, and all but ``class_error`` of the others, with
            ``_0``, ``_1``, ... and ``_enc`` appended.

        Raises:
            TypeError: if ``outputs`` or the targets are not of these kinds.
            ValueError: if ``group_detr`` does not divide the number of queries, the layers have different shapes, or
                targets do not fit.
        """
        layers = {"": outputs}
        if isinstance(outputs, Mapping):
            layers |= {f"_{index}": layer for index, layer in enumerate(outputs.get("aux_outputs", ()))}
            if "enc_outputs" in outputs:
                layers["_enc"] = outputs["enc_outputs"]
        _check_outputs(layers)
        logits = torch.stack([layer["pred_logits"] for layer in layers.values()])  # [layers, B, K * N, C]
        boxes = torch.stack([layer["pred_boxes"] for layer in layers.values()])  # [layers, B, K * N, 4]
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        packed = _pack(targets)
        groups = _split(logits.shape[2], self._num_groups, "; after criterion.eval() there is one" * self.training)
        if num_boxes is None:
            num_boxes = self.num_boxes_for_targets(outputs, targets)

        matching = self.matcher.match(logits.detach(), boxes.detach(), packed, groups)
        labels = packed.labels.repeat(1, groups.num_groups)  # [B, K * T]
        predicted = _rows(boxes, matching.queries)  # [layers, B, K * T, 4]
        expected = packed.boxes.to(boxes.dtype).repeat(1, groups.num_groups, 1)  # [B, K * T, 4]
        found = {}
        if "labels" in self.losses:
            iou = _aligned_iou(predicted.detach(), expected) if self.ia_bce_loss else None
            found["loss_ce"] = self._class_loss(logits, labels, packed, matching, iou) / num_boxes
        if "boxes" in self.losses:
            giou = aligned_generalized_box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(expected))
            found["loss_bbox"] = sum_counted((predicted - expected).abs().sum(-1), matching.matched) / num_boxes
            found["loss_giou"] = sum_counted(1 - giou, matching.matched) / num_boxes
        if "cardinality" in self.losses:
            count = self._predicts_object(logits.detach()).sum(-1)  # [layers, B]
            found["cardinality_error"] = (count - packed.num_targets).abs().float().mean(1)
        losses = {
            name + suffix: value
            for name, values in found.items()
            for suffix, value in zip(layers, values.unbind(), strict=True)
        }
        if "labels" in self.losses:
            losses["class_error"] = _class_error(logits[0].detach(), labels, matching)
        return losses

    @property
    def _num_groups(self) -> int:
        return self.group_detr if self.training else 1

    def num_boxes_for_targets(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> Tensor:
        """What the losses are divided by: boxes of the batch times groups, averaged over processes, at least 1.

        All processes must call this together. ``outputs`` only tells the device.
        """
        count = sum(len(target["labels"]) for target in targets)
        if not self.sum_group_losses:
            count *= self._num_groups
        num_boxes = torch.full((), float(count), device=outputs["pred_logits"].device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(num_boxes)
            num_boxes = num_boxes / dist.get_world_size()
        return num_boxes.clamp(min=1)

    def _class_loss(
        self, logits: Tensor, labels: Tensor, targets: PackedTargets, matching: Matching, iou: Tensor | None
    ) -> Tensor:
        """Class loss of each layer, summed: ``[layers]``.

        The IoU-aware loss (LW-DETR, section 3) of a matched query's own class is the cross-entropy with the target
        ``score^alpha * iou^(1 - alpha)``; every other entry counts as in a focal loss without weights.

        Args:
            logits: ``[layers, B, Q, C]``.
            labels: ``[B, K * T_max]``.
            iou: ``[layers, B, K * T_max]`` of matched pairs, for the IoU-aware loss; None for the focal loss.
        """
        classes = matching.classes(targets, logits.shape[2], ops.NO_OBJECT)  # [layers, B, Q]
        if iou is None:
            return ops.sigmoid_focal_loss(logits, classes, alpha=self.focal_alpha, gamma=_GAMMA).sum(1)
        others = ops.sigmoid_focal_loss(logits, classes, alpha=0.0, gamma=_GAMMA).sum(1)
        own = logits.flatten(2).gather(2, matching.queries * logits.shape[3] + labels).to(iou.dtype)
        quality = own.detach().sigmoid() ** self.focal_alpha * iou ** (1 - self.focal_alpha)
        cross_entropy = F.binary_cross_entropy_with_logits(own, quality.clamp(min=_LEAST_QUALITY), reduction="none")
        return others + sum_counted(cross_entropy, matching.matched)

    @staticmethod
    def _predicts_object(logits: Tensor) -> Tensor:
        """Whether each query of ``[..., Q, C]`` counts as a prediction: the best class is not the last one.

        The rule is DETR's, whose last class is "no object"; the family kept it with sigmoid classes.
        """
        return logits.argmax(-1) != logits.shape[-1] - 1


def _refuse(name: str, options: Mapping[str, Any]) -> None:
    on = sorted(option for option, value in options.items() if value)
    if on:
        raise ValueError(f"{name} of {__name__} does not support {', '.join(on)}")


def _check_outputs(layers: Mapping[str, Any]) -> None:
    """Check that every layer has class logits and boxes, of the shapes of the last one's, which is named ""."""
    shape: Sequence[int] | None = None
    for suffix, layer in layers.items():
        name = {"": "outputs", "_enc": "enc_outputs"}.get(suffix, f"aux_outputs[{suffix[1:]}]")
        if not isinstance(layer, Mapping) or not {"pred_logits", "pred_boxes"} <= layer.keys():
            found = ", ".join(map(str, layer)) if isinstance(layer, Mapping) else f"a {type(layer).__name__}"
            raise TypeError(f"{name} must be a dictionary with pred_logits and pred_boxes, got {found}")
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        shape = logits.shape if shape is None else shape
        if logits.dim() != 3 or logits.shape != shape:
            wanted = "[B, K * N, C]" if logits.dim() != 3 else f"{list(shape)}, as that of the last layer"
            raise ValueError(f"pred_logits of {name} must have shape {wanted}, got {list(logits.shape)}")
        if boxes.shape != (*shape[:2], 4):
            raise ValueError(f"pred_boxes of {name} must have shape {[*shape[:2], 4]}, got {list(boxes.shape)}")


def _pack(targets: Sequence[Target]) -> PackedTargets:
    if isinstance(targets, Mapping | Tensor) or not all(isinstance(target, Mapping) for target in targets):
        raise TypeError(
            f"targets must be a list with a dictionary of labels and boxes for each image, got a "
            f"{type(targets).__name__}"
        )
    if any("valid" in target for target in targets):
        raise ValueError("targets padded to a fixed size (with the key 'valid') are not supported: pass them unpadded")
    return PackedTargets.from_list([{key: target[key] for key in target if key != "masks"} for target in targets])


def _checked_groups(group_detr: int) -> int:
    if not isinstance(group_detr, int) or group_detr < 1:
        raise ValueError(f"group_detr must be an integer of at least 1, got {group_detr!r}")
    return group_detr


def _split(num_queries: int, num_groups: int, hint: str = "") -> QueryGroups:
    if num_queries % _checked_groups(num_groups):
        raise ValueError(f"group_detr must divide the number of queries, {num_queries}, got {num_groups}{hint}")
    return QueryGroups(num_groups, num_queries // num_groups)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[..., M]`` of ``[..., Q, D]``: ``[..., M, D]``."""
    return values.gather(-2, rows[..., None].expand(*rows.shape, values.shape[-1]))


def sum_counted(losses: Tensor, counted: Tensor) -> Tensor:
    """Sum of ``[layers, B, M]`` over what is counted (bool, same shape): ``[layers]``."""
    return losses.where(counted, 0).flatten(1).sum(1)


def _aligned_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of corresponding ``cxcywh`` boxes, ``[..., 4]`` and ``[..., 4]`` (broadcast): ``[...]``, 0 for empty ones."""
    first, second = cxcywh_to_xyxy(first), cxcywh_to_xyxy(second)
    size = first[..., 2:].minimum(second[..., 2:]) - first[..., :2].maximum(second[..., :2])
    intersection = size.clamp(min=0).prod(-1)
    union = box_area(first) + box_area(second) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def _class_error(logits: Tensor, labels: Tensor, matching: Matching) -> Tensor:
    """Percentage of matched queries of the first layer in ``matching`` whose best class is wrong; 100 if none."""
    queries, matched = matching.queries[0], matching.matched[0]
    correct = (_rows(logits, queries).argmax(-1) == labels) & matched
    return 100 - 100 * correct.sum() / matched.sum().clamp(min=1)
