"""The arguments of everything that predicts: how to detect, and which detections to keep."""

from dataclasses import dataclass
from typing import TypedDict

from ..models.postprocess import check_selection
from .selection import Classes, Thresholds
from .settings import InferenceSettings
from .tiles import Merge, Metric, Tiling

__all__ = ["Options", "PredictOptions"]


class PredictOptions(TypedDict, total=False):
    """What ``predict`` and ``predict_video`` take as further arguments, all by name.

    Attributes:
        score_threshold: detections with lower scores are left out; 0.3.
        classes: what to detect: names of classes, or their numbers as in ``"labels"``, one or several; a string may
            have several names with commas between them. None, the default, for all.
        class_thresholds: for some classes a score in place of ``score_threshold``, by name or number; or the string
            ``"person=0.3,car=0.5"``; or the path of a json or yaml file with such a table, as the
            ``class_thresholds.json`` of an evaluation. A class whose threshold is None has ``score_threshold``.
        top_k: detections per image, or per tile; 100. Those that ``classes`` and thresholds leave out do not count.
        batch_size: images or tiles at a time, padded to the largest of them; 4.
        tile: divide images into overlapping squares of this side, in pixels of the image, detect in each and join what
            is found: for objects that are small in large images. None, the default, to detect in whole images.
        tile_overlap: of neighbouring tiles, at least, as a share of ``tile``; 0.2.
        tile_whole: with tiles, also detect in the whole image, for objects larger than a tile; True.
        tile_merge: of detections of one class that overlap, ``"nmm"``, the default, joins all to a box around them, as
            SAHI's GREEDYNMM does, and ``"nms"`` keeps the best one.
        tile_metric: their intersection over the smaller box, ``"ios"``, the default, or over their union, ``"iou"``.
        tile_match: from which overlap on they are the same object; 0.5.
        settings: names of the classes, sizes and normalisation; by default the model's ``inference_settings``, or those
            of :class:`InferenceSettings` for a model without.
    """

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


@dataclass(frozen=True, kw_only=True)
class Options:
    """:class:`PredictOptions` with their defaults, checked.

    Raises:
        ValueError: for settings that cannot be.
    """

    score_threshold: float = 0.3
    classes: Classes | None = None
    class_thresholds: Thresholds | None = None
    top_k: int = 100
    batch_size: int = 4
    tile: int | None = None
    tile_overlap: float = 0.2
    tile_whole: bool = True
    tile_merge: Merge = "nmm"
    tile_metric: Metric = "ios"
    tile_match: float = 0.5
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
