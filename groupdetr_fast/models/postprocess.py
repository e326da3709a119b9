"""From a model's output to detections in pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..boxes import cxcywh_to_xyxy, masks_to_xyxy
from .output import DetectorOutput, SegmentationOutput

__all__ = ["check_selection", "postprocess"]

PIXELS_AT_ONCE = 8_000_000  # of masks that are interpolated together, at 5 bytes each; at least one mask
LEFT_OUT = -1.0  # in place of a score below the threshold of its class


def check_selection(top_k: int, score_threshold: float | Tensor = 0.0) -> None:
    """Check what selects detections, before anything is computed.

    Raises:
        ValueError: for a ``top_k`` below 1, a threshold that no score can have, or thresholds of any other shape than
            one for each class. The values of a tensor are not looked at, since they may lie on a GPU.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if isinstance(score_threshold, Tensor):
        if score_threshold.dim() != 1:
            raise ValueError(f"thresholds must have the shape [C], got {list(score_threshold.shape)}")
    elif not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in [0, 1], got {score_threshold}")


@torch.no_grad()
def postprocess(
    out: DetectorOutput | SegmentationOutput,
    image_sizes: Tensor | Sequence[tuple[int, int]],
    *,
    top_k: int = 100,
    score_threshold: float | Tensor = 0.0,
    group: int = 0,
    device: torch.device | str | None = None,
) -> list[dict[str, Tensor]]:
    """The best ``top_k`` pairs of query and class of each image, as in Deformable DETR and in Mask2Former.

    Of a detector of boxes with a class "no object", as DETR is, every query has its best class alone.

    Masks are interpolated as in Mask2Former's repository: to the frame that the model saw, and from the image's part of
    it to the image. Their scores are the probability of the class times the mean probability of the pixels inside.

    Args:
        out: predictions; those of the last decoder layer count.
        image_sizes: ``[B, 2]``, (height, width) of the images in pixels before any resizing.
        top_k: detections per image; fewer where a group has fewer query-class pairs.
        score_threshold: detections with lower scores are left out, before the best are counted; one for all classes,
            or ``[C]``, one for each, where a threshold above 1 leaves out a class.
        group: which group of ``out`` to use, where it has several.
        device: where the detections go; None for where the predictions are. Boxes of a whole batch go at once, so that
            the host waits for a GPU one time.

    Returns:
        Per image ``{"scores": [k] in [0, 1], descending, "labels": [k] int64, "boxes": [k, 4] xyxy in pixels}``; of a
        model that predicts masks also ``"masks": [k, height, width]`` bool, which the boxes then enclose.

    Raises:
        ValueError: if ``image_sizes`` does not have one row per image; for a ``top_k`` below 1, a threshold outside
            [0, 1], or another number of thresholds than of classes.
    """
    check_selection(top_k, score_threshold)
    if isinstance(score_threshold, Tensor):
        if len(score_threshold) != out.num_classes:
            raise ValueError(f"expected {out.num_classes} thresholds, one for each class, got {len(score_threshold)}")
        score_threshold = score_threshold.to(out.logits.device, torch.float32)
    batch, sizes = out.logits.shape[1], torch.as_tensor(image_sizes)
    if sizes.shape != (batch, 2):
        raise ValueError(f"image_sizes must have shape [{batch}, 2], got {list(sizes.shape)}")
    rows = slice(*out.groups.group_range(group))
    if isinstance(out, SegmentationOutput):
        found = _detect_masks(out, sizes, top_k, score_threshold, rows)
        return [{name: each.to(device) for name, each in detection.items()} for detection in found] if device else found
    return _detect_boxes(out, sizes, top_k, score_threshold, rows, device)


def _detect_boxes(
    out: DetectorOutput,
    image_sizes: Tensor,
    top_k: int,
    threshold: float | Tensor,
    rows: slice,
    device: torch.device | str | None,
) -> list[dict[str, Tensor]]:
    logits, boxes = out.logits[-1, :, rows].float(), out.boxes[-1, :, rows].float()
    if out.no_object:
        scores, labels, queries = _best_queries(logits.softmax(-1)[..., :-1], top_k, threshold)
    else:
        scores, labels, queries = _best_pairs(_above(logits.sigmoid(), threshold), top_k)
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    if device is not None:  # in one tensor; numbers of classes are exact in float32
        packed = torch.cat((scores[..., None], labels[..., None], chosen), dim=-1).to(device)
        scores, labels, chosen = packed[..., 0], packed[..., 1].long(), packed[..., 2:]
    pixels = cxcywh_to_xyxy(chosen) * image_sizes.to(chosen).flip(1).repeat(1, 2)[:, None]
    counts = _counts_above(scores, threshold)
    return [
        {"scores": scores[i, :count], "labels": labels[i, :count], "boxes": pixels[i, :count]}
        for i, count in enumerate(counts)
    ]


def _detect_masks(
    out: SegmentationOutput, image_sizes: Tensor, top_k: int, threshold: float | Tensor, rows: slice
) -> list[dict[str, Tensor]]:
    """Of masks at the size of an image there are only those to be returned, twice, and those of PIXELS_AT_ONCE."""
    probabilities = out.logits[-1, :, rows].float().softmax(-1)[..., :-1]
    scores, labels, queries = _best_pairs(_above(probabilities, threshold), top_k)
    embeddings, features = out.mask_embeddings[-1, :, rows].float(), out.mask_features.float()
    frame = (out.padding.shape[1], out.padding.shape[2])
    # Images lie in the upper left corner of the frame.
    inner_sizes = torch.stack(((~out.padding[:, :, 0]).sum(1), (~out.padding[:, 0]).sum(1)), dim=1).tolist()
    detections = []
    # What a mask adds to a score only lowers it.
    counts = _counts_above(scores, threshold)
    for index, (count, inner_size, size) in enumerate(zip(counts, inner_sizes, image_sizes.tolist(), strict=True)):
        found = [(scores[index, :0], labels[index, :0], out.padding.new_empty(0, *size))]
        at_once = max(1, PIXELS_AT_ONCE // max(math.prod(size), math.prod(frame), 1))
        for part in torch.arange(count, device=scores.device).split(at_once) if count else ():
            masks, certainty = _make_masks(
                embeddings[index, queries[index, part]], features[index], frame, inner_size, size
            )
            lowered, classes = scores[index, part] * certainty, labels[index, part]
            if isinstance(threshold, Tensor) or threshold > 0:
                kept = lowered >= (threshold[classes] if isinstance(threshold, Tensor) else threshold)
                lowered, classes, masks = lowered[kept], classes[kept], masks[kept]
            found.append((lowered, classes, masks))
            del masks
        ordered, order = torch.cat([part[0] for part in found]).sort(descending=True, stable=True)
        classes = torch.cat([part[1] for part in found])[order]
        masks = torch.cat([part[2] for part in found])
        del found
        masks = masks[order]
        detections.append({"scores": ordered, "labels": classes, "boxes": masks_to_xyxy(masks), "masks": masks})
    return detections


def _above(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """Scores ``[..., C]``, less those below the threshold of their class; all of them, where there is one for all."""
    if not isinstance(threshold, Tensor):
        return scores
    return scores.masked_fill(scores < threshold, LEFT_OUT)


def _counts_above(scores: Tensor, threshold: float | Tensor) -> list[int]:
    """How many of each row of scores ``[B, k]``, which descend, are at least ``threshold``."""
    least = 0.0 if isinstance(threshold, Tensor) else threshold  # below which only those are that were left out
    if not isinstance(threshold, Tensor) and threshold <= 0:
        return [scores.shape[1]] * len(scores)
    return (scores >= least).sum(1).tolist()


def _best_pairs(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[B, N, C]`` -> the best ``top_k`` scores of each image, their classes and their queries, ``[B, k]``."""
    num_classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(top_k, scores[0].numel()), dim=1)
    return best, index % num_classes, index // num_classes


def _best_queries(scores: Tensor, top_k: int, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`_best_pairs`, of the best class of each query, which is what is compared with a threshold."""
    best, labels = scores.max(-1)
    if isinstance(threshold, Tensor):
        best = best.masked_fill(best < threshold[labels], LEFT_OUT)
    best, queries = best.topk(min(top_k, best.shape[1]), dim=1)
    return best, labels.gather(1, queries), queries


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
    inside = logits.sigmoid_().mul_(masks)  # in place: as large as the image
    return masks, inside.flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
