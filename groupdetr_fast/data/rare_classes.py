"""What makes up for classes that are rare: weights of classes, and images that come more often."""

import torch
from torch import Tensor

__all__ = ["balanced_weights", "repeat_factors"]


def balanced_weights(counts: Tensor, beta: float) -> list[float]:
    """Weights of classes by the effective number of their objects (Cui et al. 2019, equations 3 and 5).

    The effective number of n objects is (1 - beta^n) / (1 - beta): n where that is small, and 1 / (1 - beta) at most,
    since further objects of a common class show little that is new. Weights are inverse to it, and scaled so that their
    mean over all objects is 1: the loss of classes keeps its share in the total.

    Args:
        counts: ``[C]``, objects of each class.
        beta: in (0, 1]; with 1 weights are inverse to the number of objects.

    Returns:
        C numbers; 1 for classes without objects, whose weight nothing depends on.
    """
    counts = counts.double()
    effective = counts if beta == 1 else (1 - beta**counts) / (1 - beta)
    weights = torch.where(counts > 0, 1 / effective.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    weights *= counts.sum() / (weights * counts).sum()
    found: list[float] = weights.where(counts > 0, 1.0).tolist()
    return found


def repeat_factors(labels: Tensor, images: Tensor, num_images: int, threshold: float) -> Tensor:
    """How often each image comes in an epoch, on average (LVIS; Gupta et al. 2019, appendix B.1).

    A class that a share f of all images has gets the factor max(1, sqrt(threshold / f)); an image has that of its
    rarest class.

    Args:
        labels: ``[M]`` int64, of all objects.
        images: ``[M]`` int64, the image that each of them is in.
        num_images: N.
        threshold: share of images below which a class is rare.

    Returns:
        ``[N]`` float64, at least 1.
    """
    factors = torch.ones(num_images, dtype=torch.float64)
    if not len(labels):
        return factors
    pairs = torch.stack((labels, images)).unique(dim=1)
    shares = torch.bincount(pairs[0]).double() / num_images
    of_classes = (threshold / shares.clamp(min=1 / num_images)).sqrt().clamp(min=1)
    return factors.scatter_reduce(0, pairs[1], of_classes[pairs[0]], "amax")
