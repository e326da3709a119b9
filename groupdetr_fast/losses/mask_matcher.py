"""One-to-one matching of every group of queries to the masks of the ground truth (Mask2Former, with Group DETR)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..groups import QueryGroups
from ..targets import PackedTargets
from .matcher import Matching, check_length, match_groups
from .points import sample_maps, sample_masks

__all__ = ["MaskMatcher"]


@dataclass(frozen=True)
class MaskMatcher:
    """Matches all layers, images and groups in one assignment, without a host synchronisation.

    The cost of a pair is that of Mask2Former's repository: minus the probability of the class, plus the binary cross
    entropy and the dice loss of the mask, both at random points. All queries of an image share its points, so that the
    features are sampled, and not the masks of all queries.

    Args:
        class_cost, mask_cost, dice_cost: weights of the three parts.
        num_points: random points of an image.
    """

    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0
    num_points: int = 12544

    @torch.no_grad()
    def __call__(
        self,
        logits: Tensor,
        mask_embeddings: Tensor,
        mask_features: Tensor,
        targets: PackedTargets,
        groups: QueryGroups,
        frame: tuple[int, int],
    ) -> Matching:
        """Match.

        Args:
            logits: ``[layers, B, K * N, C + 1]``.
            mask_embeddings: ``[layers, B, K * N, d]``.
            mask_features: ``[B, d, h, w]``.
            targets: of the B images, with masks.
            groups: how the K * N queries fall into groups.
            frame: (height, width) of what the features cover, in pixels of the masks.

        Raises:
            ValueError: if the number of queries is not K * N, or a label is not among the classes.
        """
        check_length(logits, groups)
        targets.check_labels(logits.shape[-1] - 1)  # the last class is "no object"
        points = torch.rand(len(mask_features), self.num_points, 2, device=mask_features.device)
        features = sample_maps(mask_features, points)  # [B, d, P]
        expected = self._sample_targets(targets, points, frame)
        # Layer by layer: the logits of all queries at all points are the largest tensor of the matching.
        cost = torch.stack(
            [
                self._cost(layer, embeddings @ features, targets.labels, expected)
                for layer, embeddings in zip(logits, mask_embeddings, strict=True)
            ]
        )
        return match_groups(cost, targets, groups)

    @staticmethod
    def _sample_targets(targets: PackedTargets, points: Tensor, frame: tuple[int, int]) -> Tensor:
        """The masks at points ``[B, P, 2]``: ``[B, T_max, P]``, 0 on padding."""
        images = []
        for masks, own_points in zip(targets.masks or (), points, strict=True):
            samples = sample_masks(masks, own_points.expand(len(masks), -1, -1), frame)
            images.append(F.pad(samples, (0, 0, 0, targets.max_targets - len(masks))))
        return torch.stack(images)

    def _cost(self, logits: Tensor, mask_logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
        """The cost in one layer.

        Args:
            logits: ``[B, Q, C + 1]``.
            mask_logits: ``[B, Q, P]``, at the points.
            labels: ``[B, T]``.
            expected: ``[B, T, P]`` in [0, 1], the targets' masks at the same points.

        Returns:
            ``[B, T, Q]``.
        """
        present = logits.softmax(-1).mT.gather(1, labels[..., None].expand(-1, -1, logits.shape[1]))
        # The cross entropy softplus(x) - x * y, averaged over points.
        mask = (F.softplus(mask_logits).sum(-1)[:, None] - expected @ mask_logits.mT) / mask_logits.shape[-1]
        probability = mask_logits.sigmoid()
        both = expected.sum(-1)[..., None] + probability.sum(-1)[:, None]
        dice = 1 - (2 * expected @ probability.mT + 1) / (both + 1)
        return self.mask_cost * mask + self.dice_cost * dice - self.class_cost * present
