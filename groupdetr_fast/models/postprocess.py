"""From a detector's output to detections in pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..boxes import cxcywh_to_xyxy
from .output import DetectorOutput

__all__ = ["postprocess"]


@torch.no_grad()
def postprocess(
    out: DetectorOutput, image_sizes: Tensor | Sequence[tuple[int, int]], *, top_k: int = 100, group: int = 0
) -> list[dict[str, Tensor]]:
    """The best ``top_k`` pairs of query and class of each image, as in Deformable DETR and its descendants.

    Args:
        out: predictions; those of the last decoder layer count.
        image_sizes: ``[B, 2]``, (height, width) of the images in pixels before any resizing.
        top_k: detections per image; fewer where a group has fewer query-class pairs.
        group: which group of ``out`` to use, where it has several.

    Returns:
        Per image ``{"scores": [k] in [0, 1], descending, "labels": [k] int64, "boxes": [k, 4] xyxy in pixels}``.

    Raises:
        ValueError: if ``image_sizes`` does not have one row per image.
    """
    start, stop = out.groups.group_range(group)
    logits, boxes = out.logits[-1, :, start:stop].float(), out.boxes[-1, :, start:stop].float()
    batch, _, num_classes = logits.shape
    sizes = torch.as_tensor(image_sizes, dtype=boxes.dtype, device=boxes.device)
    if sizes.shape != (batch, 2):
        raise ValueError(f"image_sizes must have shape [{batch}, 2], got {list(sizes.shape)}")
    scores, index = logits.flatten(1).sigmoid().topk(min(top_k, logits[0].numel()), dim=1)
    labels = index % num_classes
    chosen = boxes.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))
    pixels = cxcywh_to_xyxy(chosen) * sizes.flip(1).repeat(1, 2)[:, None]
    return [{"scores": scores[i], "labels": labels[i], "boxes": pixels[i]} for i in range(batch)]
