"""Matching and mask losses of transformers' universal segmenters, computed with less.

Mask2Former, OneFormer and EoMT have the same matcher and the same losses of masks, each in its own modeling file. Here
their random points are drawn in the same order, so that a seed gives the same losses; but the masks of all queries are
sampled in one pass, cross entropies come from one softplus, the assignments of all images from one call of the op, the
most uncertain points are not sorted, and no mask of the ground truth is copied or padded. The classes of the modules
are exchanged; what is not overridden here, such as the loss of classes, is transformers' own code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.models.eomt.modeling_eomt import EomtHungarianMatcher, EomtLoss
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher, Mask2FormerLoss
from transformers.models.oneformer.modeling_oneformer import OneFormerHungarianMatcher, OneFormerLoss

from ... import ops
from ...losses.points import sample_maps, sample_masks, uncertain_points

__all__ = ["exchange", "put_back"]

Pairs = tuple[Tensor, Tensor]  # matched queries, ascending, and the object of each


def exchange(module: nn.Module) -> bool:
    """Let the criterion of a universal segmenter compute as said above, in place; whether it does now.

    Those of somebody else, and transformers' own ones with a matcher of somebody else, are left alone.
    """
    if type(module) in _LOSSES and type(module.matcher) in _MATCHERS:
        module.matcher.__class__ = _MATCHERS[type(module.matcher)]
        module.__class__ = _LOSSES[type(module)]
    return isinstance(module, _MaskLoss)


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange`."""
    if isinstance(module, _MaskLoss):
        module.__class__ = type(module).__bases__[-1]
        module.matcher.__class__ = type(module.matcher).__bases__[-1]


class _MaskMatcher:
    """In place of the matchers: the same costs at the same points."""

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[Pairs]:
        """The pairs of each image, int64 on the device of the predictions, which is not waited for.

        Args:
            masks_queries_logits: ``[B, Q, h, w]``.
            class_queries_logits: ``[B, Q, C + 1]``.
            mask_labels: ``[T_b, H_b, W_b]`` of each image, 0 or 1.
            class_labels: ``[T_b]`` of each image.
        """
        device, num_queries = masks_queries_logits.device, masks_queries_logits.shape[1]
        images = zip(masks_queries_logits, class_queries_logits, mask_labels, class_labels, strict=True)
        with torch.autocast(device.type, enabled=False):
            costs = [self._cost(_in_full(masks), _in_full(logits), *labels) for masks, logits, *labels in images]
        sizes = [len(labels) for labels in class_labels]
        num_targets = torch.tensor(sizes).to(device, non_blocking=True)
        assigned = ops.linear_assignment(pad_sequence(costs, batch_first=True), num_targets)  # [B, T_max]
        pairs = []
        for row, size in zip(assigned, sizes, strict=True):
            # Objects beyond the number of queries have -1 in place of a query, and so come first.
            objects = row[:size].argsort()[max(size - num_queries, 0) :]
            pairs.append((row[objects], objects))
        return pairs

    def _cost(self, masks: Tensor, logits: Tensor, mask_labels: Tensor, class_labels: Tensor) -> Tensor:
        """The cost of each object with each query of an image: ``[T, Q]``."""
        points = torch.rand(1, self.num_points, 2, device=masks.device).to(masks.dtype)
        if not len(mask_labels):
            return masks.new_zeros(0, len(masks))
        expected = sample_maps(mask_labels[None].to(masks.dtype), points)[0]  # [T, P]
        predicted = sample_maps(masks[None], points)[0]  # [Q, P]
        # The cross entropy softplus(x) - x * y, averaged over points.
        entropy = (F.softplus(predicted).sum(1) - expected @ predicted.mT) / self.num_points
        probability = predicted.sigmoid()
        both = expected.sum(1)[:, None] + probability.sum(1)
        dice = 1 - (2 * expected @ probability.mT + 1) / (both + 1)
        present = logits.softmax(-1).mT[class_labels]
        return self.cost_mask * entropy - self.cost_class * present + self.cost_dice * dice


class _MaskLoss:
    """In place of the criteria: the same losses of masks at the same points."""

    def loss_masks(
        self, masks_queries_logits: Tensor, mask_labels: Sequence[Tensor], indices: Sequence[Pairs], num_masks: Any
    ) -> dict[str, Tensor]:
        """``loss_mask`` and ``loss_dice``, sums over matched masks divided by ``num_masks``.

        Args:
            masks_queries_logits: ``[B, Q, h, w]``.
            mask_labels: ``[T_b, H_b, W_b]`` of each image.
            indices: what the matcher returned.
            num_masks: masks of the step.
        """
        with torch.autocast(masks_queries_logits.device.type, enabled=False):
            matched = _in_full(masks_queries_logits[self._get_predictions_permutation_indices(indices)])[:, None]
            points = uncertain_points(
                matched.detach(), self.num_points, self.oversample_ratio, self.importance_sample_ratio
            )
            expected = _sample_targets(mask_labels, [objects for _, objects in indices], points)
            predicted = sample_maps(matched, points)[:, 0]  # [N, P]
            entropy = F.binary_cross_entropy_with_logits(predicted, expected, reduction="none").mean(1)
            probability = predicted.sigmoid()
            both = probability.sum(1) + expected.sum(1)
            dice = 1 - (2 * (probability * expected).sum(1) + 1) / (both + 1)
            return {"loss_mask": entropy.sum() / num_masks, "loss_dice": dice.sum() / num_masks}


class _Mask2FormerMatcher(_MaskMatcher, Mask2FormerHungarianMatcher):
    pass


class _OneFormerMatcher(_MaskMatcher, OneFormerHungarianMatcher):
    pass


class _EomtMatcher(_MaskMatcher, EomtHungarianMatcher):
    pass


class _Mask2FormerLoss(_MaskLoss, Mask2FormerLoss):
    pass


class _OneFormerLoss(_MaskLoss, OneFormerLoss):
    pass


class _EomtLoss(_MaskLoss, EomtLoss):
    pass


_MATCHERS = {cls.__bases__[-1]: cls for cls in (_Mask2FormerMatcher, _OneFormerMatcher, _EomtMatcher)}
_LOSSES = {cls.__bases__[-1]: cls for cls in (_Mask2FormerLoss, _OneFormerLoss, _EomtLoss)}


def _in_full(values: Tensor) -> Tensor:
    """Half types as float32; others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _sample_targets(mask_labels: Sequence[Tensor], objects: Sequence[Tensor], points: Tensor) -> Tensor:
    """Masks of the ground truth at points, as if all were padded to the largest height and width.

    Args:
        mask_labels: ``[T_b, H_b, W_b]`` of each image.
        objects: ``[N_b]`` int64, the objects whose masks are meant, each once.
        points: ``[N, P, 2]`` in [0, 1], of these objects, image after image.

    Returns:
        ``[N, P]``.
    """
    frame = (max(masks.shape[1] for masks in mask_labels), max(masks.shape[2] for masks in mask_labels))
    samples = []
    for masks, chosen, own in zip(mask_labels, objects, points.split([len(each) for each in objects]), strict=True):
        if len(chosen) == len(masks):  # points in the order of the masks, which are far larger
            samples.append(sample_masks(masks, own[chosen.argsort()], frame)[chosen])
        else:  # more objects than queries
            samples.append(sample_masks(masks[chosen], own, frame))
    return torch.cat(samples)
