"""Which sizes of steps have CUDA graphs: what images and targets are padded to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ..targets import PackedTargets

__all__ = ["Batch", "GraphSizes", "PaddedSizes"]


class Batch(Protocol):
    """What a step reads of a batch; see ``data.Batch``."""

    images: Tensor  # [B, 3, H, W]
    masks: Tensor  # [B, H, W] bool
    targets: PackedTargets


@dataclass(frozen=True)
class GraphSizes:
    """Which sizes have graphs.

    Attributes:
        number: graphs at most.
        image_multiple: heights and widths of images are padded to multiples of this.
        targets: numbers of targets per image to pad to, rising.

    Raises:
        ValueError: if a number is not positive, or ``targets`` do not rise.
    """

    number: int
    image_multiple: int = 128
    targets: tuple[int, ...] = (16, 32, 64, 128)

    def __post_init__(self) -> None:
        if self.number < 1 or self.image_multiple < 1:
            raise ValueError(
                f"number and image_multiple must be at least 1, got {self.number} and {self.image_multiple}"
            )
        if not self.targets or self.targets[0] < 1 or list(self.targets) != sorted(set(self.targets)):
            raise ValueError(f"targets must be positive and rise, got {self.targets}")

    def padded(self, batches: Sequence[Batch]) -> "PaddedSizes | None":
        """Those of the graph for the batches of a step; None if an image has more targets than any graph."""
        most = max(batch.targets.max_targets for batch in batches)
        targets = next((number for number in self.targets if number >= most), None)
        if targets is None:
            return None
        height, width = (
            -(-max(batch.images.shape[dim] for batch in batches) // self.image_multiple) * self.image_multiple
            for dim in (2, 3)
        )
        return PaddedSizes(tuple(len(batch.images) for batch in batches), height, width, targets)


class PaddedSizes(NamedTuple):
    """Sizes of all tensors that a step reads: one graph."""

    images: tuple[int, ...]  # of each batch
    height: int
    width: int
    targets: int  # per image
