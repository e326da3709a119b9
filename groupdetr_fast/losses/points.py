"""Points at which masks are compared, instead of everywhere (PointRend, section 3.1; Mask2Former, section 3.3)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["sample_maps", "sample_masks", "uncertain_points"]


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples; beyond the centres of the outermost cells, maps fade to zero.

    Args:
        maps: ``[N, C, h, w]``.
        points: ``[N, P, 2]``, ``(x, y)`` in [0, 1] from corner to corner of a map.

    Returns:
        ``[N, C, P]``.
    """
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def sample_masks(masks: Tensor, points: Tensor, frame: tuple[int, int]) -> Tensor:
    """Bilinear samples of masks that lie in the upper left corner of a larger frame and are empty outside.

    Args:
        masks: ``[N, H, W]`` bool.
        points: ``[N, P, 2]``, ``(x, y)`` in [0, 1] from corner to corner of the frame.
        frame: its (height, width), in pixels of the masks.

    Returns:
        ``[N, P]`` in the dtype of the points.
    """
    (height, width), (x, y) = masks.shape[1:], points.unbind(-1)
    points = torch.stack((x * (frame[1] / width), y * (frame[0] / height)), dim=-1)
    return sample_maps(masks[:, None].to(points.dtype), points)[:, 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Random points of each mask, most of them where it is least certain.

    Args:
        logits: ``[N, 1, h, w]``.
        num_points: P, points of each mask.
        oversample_ratio: ``oversample_ratio * P`` uniform points are drawn.
        importance_ratio: ``importance_ratio * P`` of them are kept, those whose logits are nearest to 0; the other
            points are drawn anew.

    Returns:
        ``[N, P, 2]``, ``(x, y)`` in [0, 1], in the dtype of the logits.
    """
    uncertain = int(importance_ratio * num_points)
    candidates = torch.rand(len(logits), int(oversample_ratio * num_points), 2, device=logits.device).to(logits.dtype)
    kept = _smallest(sample_maps(logits, candidates)[:, 0].abs(), uncertain)
    kept = candidates.gather(1, kept[..., None].expand(-1, -1, 2))
    others = torch.rand(len(logits), num_points - uncertain, 2, device=logits.device).to(logits.dtype)
    return torch.cat((kept, others), dim=1)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` smallest values of each row of ``[N, M]``, in any order: ``[N, count]`` int64.

    Of equal values at the limit those are taken that ``topk`` of the negative values takes, as in other code bases.
    """
    if values.device.type != "cpu" or not count or torch.compiler.is_compiling():
        return (-values).topk(count, dim=1, sorted=False).indices
    # On the CPU numpy selects by vector instructions, and takes a fifth of the time of topk.
    array = values.numpy()
    smallest = np.argpartition(array, count - 1, axis=1)[:, :count]
    limit = np.take_along_axis(array, smallest[:, count - 1 :], axis=1)
    tied = torch.from_numpy(np.count_nonzero(array <= limit, axis=1) > count)
    indices = torch.from_numpy(smallest)
    if tied.any():
        indices[tied] = (-values[tied]).topk(count, dim=1, sorted=False).indices
    return indices
