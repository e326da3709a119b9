"""The command ``groupdetr analyze spread``."""

from dataclasses import dataclass

from ...analysis import plots
from ...analysis.spread import spread_of_queries
from .common import OverSteps

__all__ = ["SpreadCommand"]


@dataclass(frozen=True, kw_only=True)
class SpreadCommand(OverSteps):
    """How much the queries differ, and say of the image, over the first steps of a training.

    While a query's box hardly moves from one image to the next, the detector sits on the plateau of the average box.
    """

    steps: int = 1000
    every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimization.compile:
            raise ValueError("compile hides the decoder layers, whose contents are measured: leave it out")

    def __call__(self) -> None:
        rows = self.rows_of(
            "spread",
            spread_of_queries,
            lambda row: (
                f"loss {row['loss']:.2f}; contents differ by {row['content_first']:.1%} after the first layer, "
                f"{row['content_last']:.1%} after the last; boxes by {row['box_queries']:.3f} over queries, "
                f"{row['box_images']:.3f} over images"
            ),
        )
        self.write(
            "spread",
            plots.draw_spread(rows),
            "Spread of the queries",
            "By how much the contents of an image's queries differ, relative to their length, after the first and the "
            "last decoder layer; and the boxes of an image's queries, and of one query over images, relative to the "
            f"image. Root mean squares over {self.images} images of the evaluation set, group 0; seed "
            f"{self.optimization.seed}.",
            rows,
            rows,
        )
