"""COCO's segmentations, polygons and run lengths, packed into few arrays and decoded to masks on demand."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

__all__ = ["Segmentation", "Segmentations", "parse_segmentation", "to_run_lengths"]

Segmentation = list[np.ndarray] | dict[str, Any]  # polygons [x1, y1, x2, y2, ...], or compressed run lengths

_LARGEST_SHIFT = 60  # bits of a count in a compressed string; adding to longer and longer numbers would take for ever
_LARGEST_COORDINATE = 1e5  # pixels; pycocotools walks along every edge, however long


def parse_segmentation(value: Any, height: int, width: int) -> Segmentation | None:
    """Check and convert the entry "segmentation" of an annotation.

    Args:
        value: a list of polygons; or a dict of "size" and "counts", which are a list (as COCO's crowd regions have) or
            a compressed string.
        height, width: of the image.

    Returns:
        The segmentation; None if nothing is left without polygons of less than three points or without bounds.

    Raises:
        ValueError: for anything else; the message completes the sentence "the segmentation ...".
    """
    if isinstance(value, dict):
        return _parse_run_lengths(value, height, width)
    if not isinstance(value, list):
        raise ValueError("must be a list of polygons or an object with size and counts")
    polygons = []
    for polygon in value:
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError):
            points = None
        if points is None or points.ndim != 1:
            raise ValueError("has a polygon that is no list of numbers")
        if len(points) >= 6 and len(points) % 2 == 0 and (np.abs(points) <= _LARGEST_COORDINATE).all():
            polygons.append(points)
    return polygons or None


def _parse_run_lengths(value: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    counts = value.get("counts")
    if value.get("size") != [height, width]:
        raise ValueError(f"has the size {value.get('size')}, but the image is {[height, width]} (height, width)")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("has counts that are neither a compressed string nor a list of whole numbers")
    if sum(counts) != height * width:  # pycocotools would write beyond the mask
        raise ValueError(f"has counts whose sum is {sum(counts)}, but the image has {height * width} pixels")
    return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _decompress(text: str) -> list[int]:
    """The counts of a compressed string, as COCO's ``rleFrString`` reads them, but not beyond the end of the string.

    A number has five bits in each character, lowest first; bit 5 says that another character follows, bit 4 of the last
    one is the sign. From the fourth on, numbers are differences to the last but one.
    """
    counts: list[int] = []
    number, shift = 0, 0
    if not text.isascii():
        raise ValueError("has counts with characters that compressed strings do not have")
    for character in text:
        bits = ord(character) - 48
        number |= (bits & 0x1F) << shift
        shift += 5
        if shift > _LARGEST_SHIFT:
            raise ValueError("has a count in its compressed string that does not end")
        if not bits & 0x20:
            if bits & 0x10:
                number -= 1 << shift
            counts.append(number + counts[-2] if len(counts) > 2 else number)
            number, shift = 0, 0
    return counts


def to_run_lengths(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """The compressed run lengths of a segmentation in an image of this size."""
    if isinstance(segmentation, dict):
        return segmentation
    return rle.merge(rle.frPyObjects(segmentation, height, width))


@dataclass(frozen=True)
class Segmentations:
    """Segmentations of ``M`` objects.

    Held in few objects, since every worker process of a data loader copies each Python object that it looks at.

    Attributes:
        coordinates: of all polygons, one after another, float64.
        polygon_offsets: polygon ``p`` has the coordinates ``polygon_offsets[p]:polygon_offsets[p + 1]``.
        object_offsets: object ``i`` has the polygons ``object_offsets[i]:object_offsets[i + 1]``.
        encoded_objects: ascending, the objects that have run lengths and no polygons.
        counts: compressed run lengths of these objects, one after another, uint8.
        count_offsets: those of ``encoded_objects[j]`` are ``counts[count_offsets[j]:count_offsets[j + 1]]``.
    """

    coordinates: np.ndarray
    polygon_offsets: np.ndarray
    object_offsets: np.ndarray
    encoded_objects: np.ndarray
    counts: np.ndarray
    count_offsets: np.ndarray

    @classmethod
    def pack(cls, segmentations: Sequence[Segmentation]) -> "Segmentations":
        """Pack the segmentations of all objects, in their order."""
        of_object = [value if isinstance(value, list) else [] for value in segmentations]
        polygons = [polygon for some in of_object for polygon in some]
        encoded = {index: value["counts"] for index, value in enumerate(segmentations) if isinstance(value, dict)}
        return cls(
            np.concatenate(polygons) if polygons else np.empty(0),
            np.cumsum([0, *map(len, polygons)]),
            np.cumsum([0, *map(len, of_object)]),
            np.array(list(encoded), dtype=np.int64),
            np.frombuffer(b"".join(encoded.values()), dtype=np.uint8),
            np.cumsum([0, *map(len, encoded.values())]),
        )

    def masks(self, start: int, stop: int, height: int, width: int) -> Tensor:
        """Masks ``[stop - start, height, width]`` uint8 of the objects ``start ... stop - 1``, all of one image."""
        masks = np.zeros((stop - start, height, width), dtype=np.uint8)
        for index in range(start, stop):
            masks[index - start] = rle.decode(self._encoded(index, height, width))
        return torch.from_numpy(masks)

    def _encoded(self, index: int, height: int, width: int) -> dict[str, Any]:
        place = int(np.searchsorted(self.encoded_objects, index))
        if place < len(self.encoded_objects) and self.encoded_objects[place] == index:
            start, stop = self.count_offsets[place : place + 2]
            return {"size": [height, width], "counts": self.counts[start:stop].tobytes()}
        first, last = self.object_offsets[index : index + 2]
        bounds = self.polygon_offsets[first : last + 1]
        return to_run_lengths([self.coordinates[a:b] for a, b in itertools.pairwise(bounds)], height, width)
