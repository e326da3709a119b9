"""A training step of RF-DETR, some groups of queries at a time, so that its memory hardly grows with their number.

Each pass is RF-DETR's own forward pass: of a copy of the model that shares its parameters but has some of its groups,
and finds the features of the images already there. ``integrations.passes`` adds the passes up.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rfdetr.models.criterion import SetCriterion
from rfdetr.models.lwdetr import LWDETR
from rfdetr.utilities.tensors import NestedTensor
from torch import Tensor, nn

from ..passes import sum_in_passes
from .criterion import predicts_object

__all__ = ["GroupPasses", "check_passes"]

_UNSUPPORTED = ("compile", "cuda_graphs", "use_grouppose_keypoints", "segmentation_head")

_HEADS = ("enc_output", "enc_output_norm", "enc_out_class_embed", "enc_out_bbox_embed", "enc_out_keypoint_embed")

Losses = dict[str, Tensor]
Targets = list[dict[str, Tensor]]


def check_passes(config: Any) -> None:
    """Check that a model of this configuration can be trained in passes.

    Raises:
        ValueError: if it cannot.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name, False):
            raise ValueError(f"groups_per_pass does not work with {name}=True: leave one of them out")


class GroupPasses:
    """Stands in for model and criterion in one training step: call :meth:`encode`, then the object itself.

    Args:
        model, criterion: of RF-DETR, both in training mode.
        groups_per_pass: at least 1; the last pass has what is left.
        start: scalar that the gradients inside a pass begin with, such as the scale of a GradScaler; half types would
            lose small gradients otherwise. What leaves the step does not depend on it.
    """

    def __init__(self, model: LWDETR, criterion: SetCriterion, groups_per_pass: int, start: Tensor | float = 1.0):
        self.model = model
        self.criterion = criterion
        self.weight_dict = criterion.weight_dict
        self.groups_per_pass = groups_per_pass
        self.start = start

    def encode(self, samples: NestedTensor, targets: Targets | None = None) -> dict[str, Any]:
        """The features of the images, and all predictions where passes would change them.

        On small images, with fewer proposals than queries, RF-DETR hands proposals of one group to another.
        """
        features = self.model.backbone(samples)
        proposals = sum(feature.tensors.shape[-2:].numel() for feature in features[0])
        if self.model.two_stage and proposals < self.model.num_queries:
            return _with_groups(self.model, features, 0, self.model.group_detr).forward(samples)
        return {"samples": samples, "features": features}

    def __call__(self, outputs: dict[str, Any], targets: Targets, num_boxes: Tensor | float | None = None) -> Losses:
        """The losses of all groups, as the criterion gives them; ``outputs`` get the predictions of the first group.

        Only their sum with ``weight_dict`` has a gradient, since that is what the passes ask for.
        """
        if "features" not in outputs:
            return self.criterion(outputs, targets, num_boxes)
        samples, features = outputs.pop("samples"), outputs.pop("features")
        if num_boxes is None:
            num_boxes = self.criterion.num_boxes_for_targets({"images": samples.tensors}, targets)
        parameters = [
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not name.startswith("backbone.")
        ]
        tensors, rebuild = _take_apart(features)
        found = _Sum(self.model.group_detr, targets, self.weight_dict)

        def run(first: int, cut: Sequence[Tensor]) -> Tensor:
            count = min(self.groups_per_pass, self.model.group_detr - first)
            predictions = _with_groups(self.model, rebuild(cut), first, count).forward(samples)
            criterion = copy.copy(self.criterion)
            criterion.group_detr = count
            if first == 0:
                rows = self.model.num_queries
                outputs.update({key: predictions[key][:, :rows].detach() for key in ("pred_logits", "pred_boxes")})
            return found.add(count, predictions, criterion(predictions, targets, num_boxes))

        starts = range(0, self.model.group_detr, self.groups_per_pass)
        return found.losses(sum_in_passes(run, starts, tensors, parameters, start=self.start))


class _Sum:
    """Adds up what the criterion finds for some groups at a time.

    Args:
        num_groups: of all passes together.
        targets: as the criterion takes them.
        weights: of the losses, by name.
    """

    def __init__(self, num_groups: int, targets: Targets, weights: Mapping[str, float]):
        self.num_groups = num_groups
        self.targets = targets
        self.weights = weights
        self.names: list[str] = []  # of the losses, in the order of add()
        self.error: Tensor | float = 0.0
        self.counts: dict[str, Tensor] = {}  # by the suffix of a layer's losses: [B], queries that count as objects

    def add(self, count: int, predictions: dict[str, Any], found: Losses) -> Tensor:
        """Add what ``count`` groups predict and the criterion finds: ``[losses, 2]``, each loss and its weight."""
        for name, value in found.items():
            if name == "class_error":  # as many queries are matched in each group
                self.error = self.error + value.detach() * (count / self.num_groups)
            elif name.startswith("cardinality_error"):
                suffix = name.removeprefix("cardinality_error")
                counted = predicts_object(_layer(predictions, suffix)["pred_logits"].detach()).sum(1)
                self.counts[suffix] = self.counts.get(suffix, 0) + counted
        self.names = [name for name in found if name.startswith("loss_")]
        values = torch.stack([found[name] for name in self.names])
        weights = [values.new_full((), self.weights.get(name, 0.0)) for name in self.names]
        return torch.stack((values, torch.stack(weights)), dim=1)

    def losses(self, values: Tensor) -> Losses:
        """``[losses]``, summed over all groups, with their names and with what is no loss."""
        losses = dict(zip(self.names, values.unbind(), strict=True))
        if isinstance(self.error, Tensor):
            losses["class_error"] = self.error
        sizes = [target["valid"].sum() if "valid" in target else len(target["labels"]) for target in self.targets]
        for suffix, counted in self.counts.items():
            differences = [(count - size).abs() for count, size in zip(counted.unbind(), sizes, strict=True)]
            losses[f"cardinality_error{suffix}"] = torch.stack(differences).float().mean()
        return losses


def _layer(predictions: dict[str, Any], suffix: str) -> dict[str, Tensor]:
    """The predictions whose losses have a suffix: those of the last layer, of one before it or of the encoder."""
    if suffix == "_enc":
        return predictions["enc_outputs"]
    return predictions["aux_outputs"][int(suffix[1:])] if suffix else predictions


def _take_apart(features: Sequence[Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Sequence[Any]]]:
    """The tensors in what the backbone returns, but for masks, and a function that puts others in their place."""
    maps, positions, others = features
    nested = [*maps, *(others or ())]
    tensors = [*positions, *(feature.tensors for feature in nested)]

    def rebuild(cut: Sequence[Tensor]) -> Sequence[Any]:
        again = [copy.copy(feature) for feature in nested]
        for feature, tensor in zip(again, cut[len(positions) :], strict=True):
            feature.tensors = tensor
        return again[: len(maps)], list(cut[: len(positions)]), None if others is None else again[len(maps) :]

    return tensors, rebuild


def _with_groups(model: LWDETR, features: Sequence[Any], first: int, count: int) -> LWDETR:
    """The model with some of its groups and with features for a backbone: a copy that shares its parameters."""
    view = _share(model)
    view.group_detr = count
    view._modules["backbone"] = _Given(features)
    rows = slice(first * model.num_queries, (first + count) * model.num_queries)
    for name in ("refpoint_embed", "query_feat"):
        view._modules[name] = _Rows(getattr(model, name).weight[rows])
    transformer = view._modules["transformer"] = _share(model.transformer)
    transformer.group_detr = count
    for name in _HEADS:
        heads = getattr(transformer, name, None)
        if heads is not None:
            transformer._modules[name] = nn.ModuleList(list(heads)[first : first + count])
    decoder = transformer._modules["decoder"] = _share(transformer.decoder)
    decoder._modules["layers"] = nn.ModuleList([_share(layer) for layer in decoder.layers])
    for layer in decoder.layers:
        layer.group_detr = count
    return view


def _share(module: nn.Module) -> Any:
    """A shallow copy, whose own modules can be exchanged without those of the original."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


class _Given(nn.Module):
    """A backbone that has seen the images already."""

    def __init__(self, features: Sequence[Any]):
        super().__init__()
        self.features = features

    def forward(self, samples: NestedTensor) -> Sequence[Any]:
        return self.features


class _Rows(nn.Module):
    """Some rows of an embedding, as its ``weight``."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight
