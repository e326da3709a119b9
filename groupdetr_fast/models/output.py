"""What a detector returns."""

from dataclasses import dataclass

from torch import Tensor

from ..groups import QueryGroups
from ..layers.denoising import DenoisingQueries

__all__ = ["DenoisingOutput", "DetectorOutput", "EncoderOutput", "SegmentationOutput"]


@dataclass
class DenoisingOutput:
    """Predictions of every decoder layer for the denoising queries (DN-DETR, DINO).

    Attributes:
        logits: ``[layers, B, D, C]``.
        boxes: ``[layers, B, D, 4]``.
        queries: what the D queries were made from and what they must predict.
    """

    logits: Tensor
    boxes: Tensor
    queries: DenoisingQueries


@dataclass
class EncoderOutput:
    """Predictions of the encoder's tokens that a two-stage detector selected as queries.

    Attributes:
        logits: ``[B, Q, C]``, in the order of the queries.
        boxes: ``[B, Q, 4]``.
    """

    logits: Tensor
    boxes: Tensor


@dataclass
class DetectorOutput:
    """Predictions of every decoder layer, last layer last.

    Attributes:
        logits: ``[layers, B, Q, C]``, one logit per class (sigmoid), Q = K * N; C + 1 with ``no_object``.
        boxes: ``[layers, B, Q, 4]``, ``cxcywh`` in [0, 1], relative to each image's own size without padding.
        groups: how the Q queries fall into groups; it has no denoising queries.
        denoising: predictions of the denoising queries, where there were any.
        encoder: predictions of the first stage, of two-stage detectors.
        no_object: whether the classes exclude each other (softmax), and the last one is "no object".
    """

    logits: Tensor
    boxes: Tensor
    groups: QueryGroups
    denoising: DenoisingOutput | None = None
    encoder: EncoderOutput | None = None
    no_object: bool = False

    @property
    def num_classes(self) -> int:
        """Of objects, without "no object"."""
        return self.logits.shape[-1] - self.no_object

    @classmethod
    def from_sequence(
        cls,
        logits: Tensor,
        boxes: Tensor,
        groups: QueryGroups,
        denoising: DenoisingQueries | None,
        encoder: EncoderOutput | None = None,
    ) -> "DetectorOutput":
        """Set the predictions of the denoising queries, which stand first in the sequence, apart.

        Args:
            logits: ``[layers, B, D + Q, C]``.
            boxes: ``[layers, B, D + Q, 4]``.
            groups: how the Q matching queries fall into groups.
            denoising: the D denoising queries; None for none.
            encoder: predictions of the first stage; None for none.
        """
        if denoising is None:
            return cls(logits, boxes, groups, None, encoder)
        sizes = (denoising.groups.denoising_length, groups.length)
        denoising_logits, logits = logits.split(sizes, dim=2)
        denoising_boxes, boxes = boxes.split(sizes, dim=2)
        return cls(logits, boxes, groups, DenoisingOutput(denoising_logits, denoising_boxes, denoising), encoder)


@dataclass
class SegmentationOutput:
    """Predictions of every layer of a model that predicts masks, those of the learned queries themselves first.

    The masks are not here, but what they are products of: those of all queries at full resolution would fill gigabytes.

    Attributes:
        logits: ``[layers, B, Q, C + 1]`` (softmax), Q = K * N; the last class is "no object".
        mask_embeddings: ``[layers, B, Q, d]``.
        mask_features: ``[B, d, h, w]``. The logit of a query's mask at a place is the product of its embedding and the
            features there.
        padding: ``[B, H, W]`` bool, True on padding, of the frame that ``h`` x ``w`` cells cover: the images of the
            batch and what the model padded them with.
        groups: how the Q queries fall into groups.
    """

    logits: Tensor
    mask_embeddings: Tensor
    mask_features: Tensor
    padding: Tensor
    groups: QueryGroups

    @property
    def num_classes(self) -> int:
        """Of objects, without "no object"."""
        return self.logits.shape[-1] - 1
