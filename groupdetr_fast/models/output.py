"""What a detector returns."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..groups import QueryGroups

__all__ = ["DetectorOutput"]


@dataclass
class DetectorOutput:
    """Predictions of every decoder layer, last layer last.

    Attributes:
        logits: ``[layers, B, Q, C]``, one logit per class (sigmoid), Q = K * N.
        boxes: ``[layers, B, Q, 4]``, ``cxcywh`` in [0, 1], relative to each image's own size without padding.
        groups: how the Q queries fall into groups; it has no denoising queries.
        denoising: predictions of the denoising queries, for detectors that have them.
    """

    logits: Tensor
    boxes: Tensor
    groups: QueryGroups
    denoising: Any = None
