"""RF-DETR's matching and losses, for all layers, images and groups at once."""

from typing import Any

import torch
from rfdetr.models.criterion import SetCriterion
from rfdetr.models.matcher import HungarianMatcher
from torch import Tensor, nn

from .. import detr

__all__ = ["exchange", "is_exchanged", "predicts_object", "put_back"]

_LOSSES = {"labels", "boxes", "cardinality"}
_LEAST_AREA = 1e-7  # the least union that RF-DETR divides by; this package divides by any
_SLACK = 0.01  # by which boxes may leave the image; beyond it PackedTargets refuses them

Outputs = dict[str, Any]
Targets = list[dict[str, Tensor]]


def exchange(module: nn.Module) -> bool:
    """Let a module compute as below, in place, if it is RF-DETR's criterion itself; whether it does now."""
    if type(module) is SetCriterion:
        module.__class__ = _SetCriterion
    return is_exchanged(module)


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange`."""
    if is_exchanged(module):
        module.__class__ = SetCriterion


def is_exchanged(module: nn.Module) -> bool:
    return type(module) is _SetCriterion


def predicts_object(logits: Tensor) -> Tensor:
    """Whether each query of ``[..., Q, C]`` counts as a prediction: by a score above one half."""
    return logits.amax(-1).sigmoid() > 0.5


class _Losses(detr.SetCriterion):
    @staticmethod
    def _predicts_object(logits: Tensor) -> Tensor:
        return predicts_object(logits)


class _SetCriterion(SetCriterion):
    """Their own code computes what :func:`_fits` leaves out, and what the options below ask for."""

    def forward(self, outputs: Outputs, targets: Targets, num_boxes: Tensor | float | None = None) -> dict[str, Tensor]:
        if not (self._has_detection_losses() and _fits(outputs, targets)):
            return super().forward(outputs, targets, num_boxes)
        if num_boxes is None:
            num_boxes = self.num_boxes_for_targets(outputs, targets)
        elif isinstance(num_boxes, Tensor):
            num_boxes = num_boxes.to(outputs["pred_logits"].device, torch.float)
        losses = self._losses()
        encoder = outputs.get("enc_outputs")
        if encoder is None or encoder["pred_logits"].shape == outputs["pred_logits"].shape:
            return losses(outputs, targets, num_boxes)
        # Small images have fewer proposals than there are queries.
        decoder = {key: value for key, value in outputs.items() if key != "enc_outputs"}
        found = losses(decoder, targets, num_boxes)
        of_encoder = losses(encoder, targets, num_boxes)
        return found | {f"{name}_enc": value for name, value in of_encoder.items() if name != "class_error"}

    def _has_detection_losses(self) -> bool:
        """Whether the options ask for nothing but what this package computes, with RF-DETR's own matcher."""
        matcher = self.matcher
        return (
            set(self.losses) <= _LOSSES
            and (self.ia_bce_loss or not (self.use_varifocal_loss or self.use_position_supervised_loss))
            and type(matcher) is HungarianMatcher
            and not matcher._forward_hooks
            and not matcher._forward_pre_hooks
        )

    def _losses(self) -> _Losses:
        matcher = self.matcher
        losses = _Losses(
            self.num_classes,
            detr.HungarianMatcher(matcher.cost_class, matcher.cost_bbox, matcher.cost_giou, matcher.focal_alpha),
            self.weight_dict,
            focal_alpha=self.focal_alpha,
            losses=self.losses,
            group_detr=self.group_detr,
            sum_group_losses=self.sum_group_losses,
            ia_bce_loss=self.ia_bce_loss,
        )
        return losses.train(self.training)


def _layers(outputs: Outputs) -> list[Outputs]:
    encoder = [outputs["enc_outputs"]] if "enc_outputs" in outputs else []
    return [outputs, *outputs.get("aux_outputs", ()), *encoder]


def _fits(outputs: Outputs, targets: Targets) -> bool:
    """Whether this package computes what RF-DETR does; a GPU is waited for once, as RF-DETR does.

    It does not for targets that are padded to a fixed size, have masks or keypoints (which take part in the matching),
    lie outside of the model's classes or of the image, or are so small that RF-DETR divides by more than the union of
    two boxes; nor for predicted boxes that are not finite or have a negative size, for which RF-DETR takes 0.
    """
    if not targets or any(key in targets[0] for key in ("valid", "masks")):
        return False
    if "keypoints" in targets[0] and "pred_keypoints" in outputs:
        return False
    logits = outputs["pred_logits"]
    labels, boxes = ([target[key] for target in targets] for key in ("labels", "boxes"))
    if any(tensor.device != logits.device for tensor in (*labels, *boxes)):
        return False
    if any(label.dtype != torch.int64 for label in labels) or len({box.dtype for box in boxes}) > 1:
        return False
    label, box = torch.cat(labels), torch.cat(boxes)
    known = (label >= 0) & (label < logits.shape[-1])
    inside = ((box >= -_SLACK) & (box <= 1 + _SLACK)).all(-1) & (box[:, 2:] >= 0).all(-1)  # False for NaN
    tests = [(known & inside & (box[:, 2] * box[:, 3] >= _LEAST_AREA)).all()]
    for layer in _layers(outputs):
        predicted = layer["pred_boxes"].detach()
        tests += [predicted.isfinite().all(), (predicted[..., 2:] >= 0).all()]
    return bool(torch.stack(tests).all())
