"""The losses of transformers, divided by the objects of a whole step."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig

from ..integrations.transformers.losses import DetectionLoss
from ..models.output import DetectorOutput
from ..targets import PackedTargets, StepTotals, check_packed
from .families import Family

__all__ = ["LossInputs", "TransformersCriterion"]

_MEAN_OF_IMAGES = "loss_ddf"  # of D-FINE and DEIMv2, whose weights follow from the batch
_NOT_TRAINED = "cardinality_error"


@dataclass(frozen=True)
class LossInputs:
    """What a model of transformers gives its loss: predictions, labels and configuration, by place and by name."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def keeping(self, weights: Iterable[Tensor]) -> "LossInputs":
        """The same inputs, with a gradient of 0 for these weights, since DistributedDataParallel waits for all."""
        zero = functools.reduce(torch.add, (weight.sum() * 0 for weight in weights), torch.zeros(()))
        if not zero.requires_grad:
            return self
        return replace(self, arguments=(self.arguments[0] + zero, *self.arguments[1:]))


class TransformersCriterion(nn.Module):
    """transformers' loss of a model, as the training loop calls criteria.

    transformers divides by the objects of one batch. What it returns is multiplied by their number and divided by that
    of the step, so that losses of batches add up to those of one batch that has them all. Three losses are no sums over
    objects, and are weighted by what they are means of: the cross entropy of DETR, a mean over queries with the weights
    of their classes; ``loss_ddf`` of D-FINE and DEIMv2, taken as a mean over images; and, with
    ``use_dense_one_to_one``, the losses of boxes of DEIMv2, means over its pairs, which are weighted by objects.

    Everything is computed in float32, also under autocast.

    Args:
        loss_function: that of the model, or this package's in its place.
        family: of the model.
        config: of the model.
        num_groups: K.
    """

    def __init__(
        self, loss_function: Callable[..., Any], family: Family, config: PretrainedConfig, num_groups: int = 1
    ):
        super().__init__()
        self.loss_function = loss_function
        self.family = family
        self.config = config
        self.num_groups = num_groups

    def forward(
        self, out: DetectorOutput, targets: PackedTargets, totals: StepTotals | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            out: of the model in training mode, which was given these targets.
            targets: of the same images.
            totals: of the step that this call is a part of; None: it is the whole step.

        Returns:
            Scalars under the names of transformers, with weights where transformers has them so; and ``loss``, the
            weighted sum of all.

        Raises:
            ValueError: if the output is not that of a model in training mode with targets.
        """
        check_packed(targets)
        inputs = getattr(out, "loss_inputs", None)
        if inputs is None:
            raise ValueError("the loss needs the output of the model in training mode, which was given the targets")
        totals = StepTotals.of([targets]) if totals is None else totals
        arguments, keywords = pytree.tree_map(_in_float32, (inputs.arguments, dict(inputs.keywords)))
        with torch.autocast(arguments[0].device.type, enabled=False):
            _, found, _ = self.loss_function(*arguments, **keywords)
        of_objects = self._objects(targets) / (totals.num_objects * self.num_groups)
        of_images = len(targets.sizes) / len(totals.sizes)
        losses = {}
        for name, value in found.items():
            if name.startswith((_MEAN_OF_IMAGES, _NOT_TRAINED)):
                losses[name] = value * of_images
            elif self.family.no_object and name.startswith("loss_ce"):
                losses[name] = value * (
                    self._class_weight(targets.sizes, arguments[0]) / self._class_weight(totals.sizes, arguments[0])
                )
            else:
                losses[name] = value * of_objects
        losses["loss"] = functools.reduce(torch.add, (self._weight(name) * value for name, value in losses.items()))
        return losses

    def _objects(self, targets: PackedTargets) -> Tensor:
        """What transformers divided by: groups times objects of the batch, at least 1."""
        count = targets.num_targets.sum().float() * self.num_groups
        if self.family.loss_counts != "process" and dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
            own = isinstance(self.loss_function, DetectionLoss)  # this package's, which divides by the mean
            if self.family.loss_counts == "divided mean" and not own:
                count = count / PartialState().num_processes
        return count.clamp(min=1)

    def _class_weight(self, sizes: tuple[int, ...], logits: Tensor) -> float:
        """Weights of all queries in a cross entropy, summed over images with these numbers of objects."""
        queries = logits.shape[1]
        matched = sum(min(size, queries) for size in sizes)
        return matched + float(self.config.eos_coefficient) * (len(sizes) * queries - matched)

    def _weight(self, name: str) -> float:
        """The weight of a loss in the total."""
        if name.startswith(_NOT_TRAINED):
            return 0.0
        if self.family.weighted:
            return 1.0
        if name.startswith("loss_ce"):
            return float(self.config.class_loss_coefficient) if self.family.groups == "own" else 1.0
        return float(
            self.config.bbox_loss_coefficient if name.startswith("loss_bbox") else self.config.giou_loss_coefficient
        )


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
