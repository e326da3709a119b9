"""From a model's output to detections in pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, masks_to_xyxy
from .output import DetectorOutput, SegmentationOutput

__all__ = ["check_selection", "postprocess"]

MASKS_AT_ONCE = 25  # that are interpolated together; each takes megabytes


def check_selection(top_k: int, score_threshold: float = 0.0) -> None:
    """Check what selects detections, before anything is computed.

    Raises:
        ValueError: for a ``top_k`` below 1 or a threshold that no score can have.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in [0, 1], got {score_threshold}")


@torch.no_grad()
def postprocess(
    out: DetectorOutput | SegmentationOutput,
    image_sizes: Tensor | Sequence[tuple[int, int]],
    *,
    top_k: int = 100,
    score_threshold: float = 0.0,
    group: int = 0,
) -> list[dict[str, Tensor]]:
    """The best ``top_k`` pairs of query and class of each image, as in Deformable DETR and in Mask2Former.

    Masks are interpolated as in Mask2Former's repository: to the frame that the model saw, and from the image's part of
    it to the image. Their scores are the probability of the class times the mean probability of the pixels inside.

    Args:
        out: predictions; those of the last decoder layer count.
        image_sizes: ``[B, 2]``, (height, width) of the images in pixels before any resizing.
        top_k: detections per image; fewer where a group has fewer query-class pairs.
        score_threshold: detections with lower scores are left out.
        group: which group of ``out`` to use, where it has several.

    Returns:
        Per image ``{"scores": [k] in [0, 1], descending, "labels": [k] int64, "boxes": [k, 4] xyxy in pixels}``; of a
        model that predicts masks also ``"masks": [k, height, width]`` bool, which the boxes then enclose.

    Raises:
        ValueError: if ``image_sizes`` does not have one row per image; for a ``top_k`` below 1 or a threshold outside
            [0, 1].
    """
    check_selection(top_k, score_threshold)
    batch, sizes = out.logits.shape[1], torch.as_tensor(image_sizes)
    if sizes.shape != (batch, 2):
        raise ValueError(f"image_sizes must have shape [{batch}, 2], got {list(sizes.shape)}")
    rows = slice(*out.groups.group_range(group))
    if isinstance(out, SegmentationOutput):
        detections = _detect_masks(out, sizes, top_k, rows)
    else:
        detections = _detect_boxes(out, sizes, top_k, rows)
    if score_threshold > 0:
        for detection in detections:
            kept = detection["scores"] >= score_threshold
            detection.update({name: value[kept] for name, value in detection.items()})
    return detections


def _detect_boxes(out: DetectorOutput, image_sizes: Tensor, top_k: int, rows: slice) -> list[dict[str, Tensor]]:
    logits, boxes = out.logits[-1, :, rows].float(), out.boxes[-1, :, rows].float()
    scores, labels, queries = _best_pairs(logits.sigmoid(), top_k)
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    pixels = cxcywh_to_xyxy(chosen) * image_sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    return [{"scores": scores[i], "labels": labels[i], "boxes": pixels[i]} for i in range(len(logits))]


def _detect_masks(out: SegmentationOutput, image_sizes: Tensor, top_k: int, rows: slice) -> list[dict[str, Tensor]]:
    scores, labels, queries = _best_pairs(out.logits[-1, :, rows].float().softmax(-1)[..., :-1], top_k)
    embeddings, features = out.mask_embeddings[-1, :, rows].float(), out.mask_features.float()
    frame = (out.padding.shape[1], out.padding.shape[2])
    # Images lie in the upper left corner of the frame.
    inner_sizes = torch.stack(((~out.padding[:, :, 0]).sum(1), (~out.padding[:, 0]).sum(1)), dim=1).tolist()
    detections = []
    for index, (inner_size, size) in enumerate(zip(inner_sizes, image_sizes.tolist(), strict=True)):
        parts = [
            _make_masks(part, features[index], frame, inner_size, size)
            for part in embeddings[index, queries[index]].split(MASKS_AT_ONCE)
        ]
        masks, certainty = (torch.cat(column) for column in zip(*parts, strict=True))
        ordered, order = (scores[index] * certainty).sort(descending=True, stable=True)
        masks = masks[order]
        boxes = masks_to_xyxy(masks)
        detections.append({"scores": ordered, "labels": labels[index, order], "boxes": boxes, "masks": masks})
    return detections


def _best_pairs(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[B, N, C]`` -> the best ``top_k`` scores of each image, their classes and their queries, ``[B, k]``."""
    num_classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(top_k, scores[0].numel()), dim=1)
    return best, index % num_classes, index // num_classes


def _make_masks(
    embeddings: Tensor, features: Tensor, frame: tuple[int, int], inner_size: Sequence[int], size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Masks at the size of the image.

    Args:
        embeddings: ``[k, d]``.
        features: ``[d, h, w]``.
        frame: (height, width) that the features cover.
        inner_size: (height, width) of the image in the frame.
        size: (height, width) of the image.

    Returns:
        ``[k, height, width]`` bool, and the mean probability inside each, ``[k]``.
    """
    logits = (embeddings @ features.flatten(1)).unflatten(1, features.shape[1:])[None]
    logits = F.interpolate(logits, size=frame, mode="bilinear", align_corners=False)
    logits = logits[..., : inner_size[0], : inner_size[1]]
    logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    inside = masks.flatten(1).to(logits.dtype)
    certainty = (logits.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    return masks, certainty
