"""Large images in tiles that overlap, so that small objects are not reduced to nothing.

Slicing aided hyper inference (SAHI; Akyon et al., ICIP 2022): each tile, and the whole image besides, is detected in as
an image of its own, and what they find is joined.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..data.transforms import LEAST_SIDE

__all__ = ["Merge", "Metric", "Place", "Tiling"]

Merge = Literal["nmm", "nms"]
Metric = Literal["ios", "iou"]

EDGE = 0.01  # of a tile's side: a box that ends so near to an edge inside the image is taken for cut off


class Place(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """How an image is divided, and how what is found is joined. The defaults are those of SAHI.

    Attributes:
        size: side of the square tiles, in pixels of the image.
        overlap: of neighbouring tiles, at least, as a share of ``size``; larger than most objects that are to be found
            in tiles, so that each of them is whole in one.
        whole: detect in the whole image, too, for objects that are larger than a tile.
        merge: of detections of the same class that overlap, "nmm" joins all to a box around them, "nms" keeps the
            best.
        metric: what their overlap is divided by: "ios" by the smaller of both boxes, which also finds a part of an
            object in the whole of it; "iou" by their union.
        match: from which share on they are the same object.

    Raises:
        ValueError: for a setting that makes no tiles.
    """

    size: int
    overlap: float = 0.2
    whole: bool = True
    merge: Merge = "nmm"
    metric: Metric = "ios"
    match: float = 0.5

    def __post_init__(self) -> None:
        if self.size < LEAST_SIDE:
            raise ValueError(f"tile must be at least {LEAST_SIDE} pixels, got {self.size}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"tile_overlap must be in [0, 1), got {self.overlap}")
        if self.merge not in get_args(Merge):
            raise ValueError(f'tile_merge must be "nmm" or "nms", got {self.merge!r}')
        if self.metric not in get_args(Metric):
            raise ValueError(f'tile_metric must be "ios" or "iou", got {self.metric!r}')
        if not 0 < self.match <= 1:
            raise ValueError(f"tile_match must be in (0, 1], got {self.match}")

    def places(self, height: int, width: int) -> list[Place]:
        """The tiles of an image, row by row, and then the whole of it; an image no larger than a tile is one."""
        if max(height, width) <= self.size:
            return [Place(0, 0, height, width)]
        tiles = [
            Place(top, left, min(self.size, height), min(self.size, width))
            for top in self._starts(height)
            for left in self._starts(width)
        ]
        return [*tiles, Place(0, 0, height, width)] if self.whole else tiles

    def _starts(self, length: int) -> list[int]:
        """Where tiles begin along a side: as few as overlap enough, at equal distances, the last one at the end."""
        step = max(1, self.size - round(self.overlap * self.size))
        gaps = -(-max(0, length - self.size) // step)
        return [round(index * (length - self.size) / gaps) for index in range(gaps + 1)] if gaps else [0]

    def join(self, found: Sequence[tuple[Place, Mapping[str, Tensor]]], height: int, width: int) -> dict[str, Tensor]:
        """The detections of an image, from those of its tiles.

        Those that reach an edge of their tile inside the image may be parts of objects: others are compared first.

        Args:
            found: each of :meth:`places` with its detections, on the CPU, in pixels of the tile.
            height, width: of the image.

        Returns:
            Detections in pixels of the image, descending by score; of one that was joined the best score. Masks are
            those of all that were joined, together.
        """
        if len(found) == 1:
            return dict(found[0][1])
        scores, labels = (torch.cat([each[name] for _, each in found]) for name in ("scores", "labels"))
        boxes = torch.cat([each["boxes"] + torch.tensor([p.left, p.top] * 2) for p, each in found])
        cut = torch.cat([_cut_off(each["boxes"], place, height, width) for place, each in found])
        # Scores are at most 1, and float64 tells those apart that float32 does.
        ranks = scores.double() + 2.0 * ~cut
        groups = self._groups(boxes, labels, ranks)
        best = torch.tensor([scores[group].max() for group in groups]).to(scores) if groups else scores[:0]
        order = best.argsort(descending=True, stable=True)
        groups = [groups[index] for index in order.tolist()]
        first = [group[0] for group in groups]
        joined = {"scores": best[order], "labels": labels[first], "boxes": boxes[first]}
        if self.merge == "nmm":
            for row, group in enumerate(groups):
                joined["boxes"][row] = _around(boxes[group])
        if "masks" in found[0][1]:
            joined["masks"] = _paste(found, groups, height, width)
        return joined

    def _groups(self, boxes: Tensor, labels: Tensor, ranks: Tensor) -> list[list[int]]:
        """Which detections become one, that of the highest rank first; those that are left out are in no group."""
        groups = []
        order = ranks.argsort(descending=True, stable=True)
        while len(order):
            first, others = order[0], order[1:]
            near = (self._overlap(boxes[first], boxes[others]) >= self.match) & (labels[others] == labels[first])
            group = [int(first)]
            if self.merge == "nmm":
                outline = boxes[first]
                for index in others[near].tolist():
                    # As in SAHI, what is joined must also match what was joined before.
                    if self._overlap(outline, boxes[index][None]) >= self.match:
                        group.append(index)
                        outline = _around(torch.stack((outline, boxes[index])))
            groups.append(group)
            order = others[~near]
        return groups

    def _overlap(self, box: Tensor, others: Tensor) -> Tensor:
        """Of a box ``[4]`` with others ``[n, 4]``."""
        box, others = box[None].double(), others.double()
        if self.metric == "iou":
            return box_iou(box, others)[0]
        inner = torch.cat((torch.maximum(box[:, :2], others[:, :2]), torch.minimum(box[:, 2:], others[:, 2:])), dim=1)
        # where they do not meet, both sides of the inner box may be negative
        sides = (inner[:, 2:] - inner[:, :2]).clamp(min=0)
        return sides.prod(1) / torch.minimum(_areas(box), _areas(others)).clamp(min=1e-9)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def _around(boxes: Tensor) -> Tensor:
    """The smallest box ``[4]`` around boxes ``[n, 4]``."""
    return torch.cat((boxes[:, :2].amin(0), boxes[:, 2:].amax(0)))


def _cut_off(boxes: Tensor, place: Place, height: int, width: int) -> Tensor:
    """Which boxes ``[n, 4]``, in pixels of a tile, end at one of its edges that is not an edge of the image."""
    near = EDGE * max(place.height, place.width)
    inner = torch.tensor(
        [place.left > 0, place.top > 0, place.left + place.width < width, place.top + place.height < height]
    )
    reached = torch.cat((boxes[:, :2] <= near, boxes[:, 2:] >= torch.tensor([place.width, place.height]) - near), dim=1)
    return (reached & inner).any(1)


def _paste(
    found: Sequence[tuple[Place, Mapping[str, Tensor]]], groups: Sequence[Sequence[int]], height: int, width: int
) -> Tensor:
    """Masks ``[k, H, W]`` of what was joined, each of all masks of its group."""
    owners = [(place, mask) for place, each in found for mask in each["masks"]]
    masks = torch.zeros(len(groups), height, width, dtype=torch.bool)
    for whole, group in zip(masks, groups, strict=True):
        for index in group:
            (top, left, tall, wide), mask = owners[index]
            whole[top : top + tall, left : left + wide] |= mask
    return masks
