"""From bytes to what a detector takes, on the device: on the way there bytes are a quarter of floats."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Normalization"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normalization:
    """Scales pixels to [0, 1], subtracts the mean and divides by the standard deviation; by default it only scales.

    Attributes:
        mean: of red, green and blue.
        std: their standard deviation.
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        """Normalise images.

        Args:
            images: ``[..., 3, H, W]`` uint8.
            padding: ``[..., H, W]`` bool, True where the result is to be 0; None for nowhere.

        Returns:
            Contiguous float32 of the same shape, on the same device.

        Raises:
            TypeError: if the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        scale, shift = _constants(self, images.device)
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
        return pixels if padding is None else pixels.masked_fill_(padding.unsqueeze(-3), 0)


@functools.lru_cache(maxsize=16)
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand ``[3, 1, 1]``; kept, as the host waits for every copy of pageable memory to a GPU."""
    deviation = torch.tensor(normalization.std).view(3, 1, 1)
    shift = -torch.tensor(normalization.mean).view(3, 1, 1) / deviation
    return (1 / (255 * deviation)).to(device), shift.to(device)
