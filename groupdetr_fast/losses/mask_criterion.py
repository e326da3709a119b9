"""The set prediction loss of masks (Mask2Former, section 3.3) over all decoder layers, images and groups."""

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..groups import QueryGroups
from ..targets import PackedTargets, StepTotals, check_packed
from .criterion import checked_class_weights, layer_suffixes
from .mask_matcher import MaskMatcher
from .matcher import Matching
from .points import sample_maps, sample_masks, uncertain_points

__all__ = ["MaskCriterion"]


class MaskPredictions(Protocol):
    """What the criterion needs of a model's output; see ``models.SegmentationOutput``."""

    logits: Tensor  # [layers, B, K * N, C + 1]
    mask_embeddings: Tensor  # [layers, B, K * N, d]
    mask_features: Tensor  # [B, d, h, w]
    padding: Tensor  # [B, H, W]
    groups: QueryGroups


class MaskCriterion(nn.Module):
    """Cross entropy of the classes, and binary cross entropy and dice loss of the matched masks.

    Each group is matched one-to-one and the loss is the mean over groups (Group DETR, section 3.2): sums over masks are
    divided by K times the number of objects, averaged over processes and at least 1; the cross entropy is a weighted
    mean over all queries. Masks are compared at random points, most of them where the prediction is least certain.
    Everything is computed in float32, also under autocast; nothing waits for the device.

    Args:
        matcher: matches queries to targets.
        class_loss, mask_loss, dice_loss: weights of the three losses in the total.
        no_object_weight: of queries without an object in the cross entropy.
        num_points, oversample_ratio, importance_ratio: see ``losses.points.uncertain_points``.
        class_weights: ``[C]``, by which the cross entropy of a query is multiplied if its object is of that class; what
            the sum is divided by stays the same. None: all count once.

    Raises:
        ValueError: for class weights that are not positive numbers.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        matcher: MaskMatcher,
        *,
        class_loss: float = 2.0,
        mask_loss: float = 5.0,
        dice_loss: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.register_buffer("class_weights", checked_class_weights(class_weights), persistent=False)
        self.matcher = matcher
        self.weights: Mapping[str, float] = {"loss_ce": class_loss, "loss_mask": mask_loss, "loss_dice": dice_loss}
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio

    def forward(
        self, out: MaskPredictions, targets: PackedTargets, totals: StepTotals | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            out: predictions of all layers.
            targets: of the same images, on the same device, with masks at the size of the model's input.
            totals: of the step that this call is a part of; None: it is the whole step.

        Returns:
            Scalars, unweighted: ``loss_ce``, ``loss_mask`` and ``loss_dice`` of the last layer, with ``_0``, ``_1``,
            ... appended for the others; and ``loss``, the weighted sum of all.

        Raises:
            ValueError: if the targets have no masks, or the number of queries is not K * N.
        """
        check_packed(targets)
        if targets.masks is None:
            raise ValueError('targets must have masks: give PackedTargets.from_list the key "masks"')
        with torch.autocast(out.logits.device.type, enabled=False):
            per_layer = self._losses(out, targets, StepTotals.of([targets]) if totals is None else totals)
        losses: dict[str, Tensor] = {}
        for name, values in per_layer.items():
            for suffix, value in zip(layer_suffixes(len(values)), values.unbind(), strict=True):
                losses[name + suffix] = value
        losses["loss"] = functools.reduce(
            torch.add, (self.weights[name] * values.sum() for name, values in per_layer.items())
        )
        return losses

    def _losses(self, out: MaskPredictions, targets: PackedTargets, totals: StepTotals) -> dict[str, Tensor]:
        """The three losses of every layer, ``[layers]`` each."""
        logits, embeddings, features = out.logits.float(), out.mask_embeddings.float(), out.mask_features.float()
        height, width = out.padding.shape[1:]
        frame = (height, width)
        detached = (logits.detach(), embeddings.detach(), features.detach())
        matching = self.matcher(*detached, targets, out.groups, frame)
        sums = self._mask_losses(embeddings, features, matching, targets, frame)
        num_groups = totals.num_groups or out.groups.num_groups
        mask, dice = (sums / (totals.num_objects * num_groups)).unbind(1)
        classes = matching.classes(targets, logits.shape[2], logits.shape[3] - 1)
        total_weight = num_groups * self._class_weight(totals.sizes, out.groups.queries_per_group)
        return {"loss_ce": self._class_loss(logits, classes, total_weight), "loss_mask": mask, "loss_dice": dice}

    def _class_weight(self, sizes: tuple[int, ...], num_queries: int) -> float:
        """Weights of one group's ``num_queries`` queries, summed over images with ``sizes`` objects.

        A number that the host knows: each group matches as many objects as it has queries for.
        """
        matched = sum(min(size, num_queries) for size in sizes)
        return matched + self.no_object_weight * (len(sizes) * num_queries - matched)

    def _class_loss(self, logits: Tensor, target_class: Tensor, total_weight: float) -> Tensor:
        """Cross entropy of every layer, a weighted mean over images and queries.

        Args:
            logits: ``[layers, B, Q, C + 1]``.
            target_class: ``[layers, B, Q]`` int64, C where there is no object.
            total_weight: of all queries of the step.

        Returns:
            ``[layers]``.
        """
        entropy = -logits.log_softmax(-1).gather(-1, target_class[..., None])[..., 0]
        of_object: Tensor | float = 1.0
        if self.class_weights is not None:
            of_object = self.class_weights[target_class.clamp(max=len(self.class_weights) - 1)]
        weight = torch.where(target_class == logits.shape[-1] - 1, self.no_object_weight, of_object)
        return (weight * entropy).flatten(1).sum(1) / total_weight

    def _mask_losses(
        self,
        embeddings: Tensor,
        features: Tensor,
        matching: Matching,
        targets: PackedTargets,
        frame: tuple[int, int],
    ) -> Tensor:
        """Sums over images and matched masks: ``[layers, 2]``, binary cross entropy and dice loss.

        One image of one layer after the other makes its matched masks, and makes them again in the backward pass:
        keeping them, or those of all queries, would take gigabytes.

        Args:
            embeddings: ``[layers, B, Q, d]``.
            features: ``[B, d, h, w]``.
            matching, targets, frame: see ``MaskMatcher``.
        """
        index = matching.queries[..., None].expand(-1, -1, -1, embeddings.shape[-1])
        shape = (matching.positives, targets.max_targets)
        chosen = embeddings.gather(2, index).unflatten(2, shape).transpose(2, 3)  # [layers, B, T, K, d]
        matched = matching.matched.unflatten(2, shape).transpose(2, 3)  # [layers, B, T, K]
        of_images = (features.unbind(), targets.masks or (), targets.sizes)
        layers = []
        for embeddings, counted in zip(chosen.unbind(), matched.unbind(), strict=True):
            images = zip(embeddings.unbind(), counted.unbind(), *of_images, strict=True)
            sums = [
                checkpoint(self._image_losses, own[:size], part, masks, counts[:size], frame, use_reentrant=False)
                for own, counts, part, masks, size in images
            ]
            layers.append(torch.stack(sums).sum(0))
        return torch.stack(layers)

    def _image_losses(
        self, embeddings: Tensor, features: Tensor, masks: Tensor, matched: Tensor, frame: tuple[int, int]
    ) -> Tensor:
        """Sums over the matched masks of one image in one layer: ``[2]``, binary cross entropy and dice loss.

        Args:
            embeddings: ``[T, K, d]``, of the queries that the T objects got in each group.
            features: ``[d, h, w]``.
            masks: ``[T, H, W]`` bool, of the objects.
            matched: ``[T, K]`` bool, the pairs that count.
            frame: see ``MaskMatcher``.
        """
        size, num_groups, _ = embeddings.shape
        logits = (embeddings.flatten(0, 1) @ features.flatten(1)).unflatten(1, (1, *features.shape[1:]))
        points = uncertain_points(logits.detach(), self.num_points, self.oversample_ratio, self.importance_ratio)
        predicted = sample_maps(logits, points)[:, 0]  # [T * K, P]
        expected = sample_masks(masks, points.view(size, num_groups * self.num_points, 2), frame).view_as(predicted)
        entropy = F.binary_cross_entropy_with_logits(predicted, expected, reduction="none").mean(1)
        probability = predicted.sigmoid()
        both = probability.sum(1) + expected.sum(1)
        dice = 1 - (2 * (probability * expected).sum(1) + 1) / (both + 1)
        counted = matched.flatten()
        return torch.stack((entropy.where(counted, 0).sum(), dice.where(counted, 0).sum()))
