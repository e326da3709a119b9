"""The arguments of everything that predicts: how to detect, and which detections to keep."""

from dataclasses import dataclass
from typing import TypedDict

from ..models.postprocess import check_selection
from .selection import Classes, Thresholds
from .settings import InferenceSettings
from .tiles import Merge, Metric, Tiling

__all__ = ["Options", "PredictOptions"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``predict`` and ``predict_video`` take as further arguments, all by name; ``groupdetr predict`` as flags.

    Attributes:
        score_threshold: detections with lower scores are left out.
        classes: what to detect: names of classes, or their numbers as in ``"labels"``, one or several; a string may
            have several names with commas between them. None for all.
        class_thresholds: for some classes a score in place of ``score_threshold``, by name or number; or the string
            ``"person=0.3,car=0.5"``; or the path of a json or yaml file with such a table, as the
            ``class_thresholds.json`` of an evaluation. A class whose threshold is None has ``score_threshold``.
        top_k: detections per image, or per tile; those that classes and thresholds leave out do not count.
        batch_size: images, tiles or frames at a time, padded to the largest of them.
        tile: detect in overlapping squares of this side, in pixels of the image, and join what is found: for small
            objects in large images; None for whole images.
        tile_overlap: of neighbouring tiles, at least, as a share of their side.
        tile_whole: with tiles, also detect in the whole image, for objects larger than a tile.
        tile_merge: of overlapping detections of a class, nmm joins all to a box around them, as SAHI's GREEDYNMM does,
            and nms keeps the best.
        tile_metric: the overlap over the smaller box, ios, or over the union, iou.
        tile_match: from which overlap on two detections are of one object.
        settings: names of the classes, sizes and normalisation; None for the model's ``inference_settings``, or for
            those of :class:`InferenceSettings` where it has none.

    Raises:
        ValueError: for settings that cannot be.
    """

    score_threshold: float = 0.3
    classes: Classes | None = None
    class_thresholds: Thresholds | None = None
    top_k: int = 100
    batch_size: int = 4
    tile: int | None = None
    tile_overlap: float = Tiling.overlap
    tile_whole: bool = Tiling.whole
    tile_merge: Merge = Tiling.merge
    tile_metric: Metric = Tiling.metric
    tile_match: float = Tiling.match
    settings: InferenceSettings | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        check_selection(self.top_k, self.score_threshold)
        self.tiling()

    def tiling(self) -> Tiling | None:
        """How images are divided; None if they are not."""
        if self.tile is None:
            return None
        return Tiling(self.tile, self.tile_overlap, self.tile_whole, self.tile_merge, self.tile_metric, self.tile_match)


class PredictOptions(TypedDict, total=False):
    """The types of what ``predict`` and ``predict_video`` take as further arguments: see :class:`Options`."""

    score_threshold: float
    classes: Classes | None
    class_thresholds: Thresholds | None
    top_k: int
    batch_size: int
    tile: int | None
    tile_overlap: float
    tile_whole: bool
    tile_merge: Merge
    tile_metric: Metric
    tile_match: float
    settings: InferenceSettings | None
