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
            spread_of_queries,
            lambda row: (
                f"loss {row['loss']:.2f}; over queries, contents differ by {row['content_first']:.1%} after the first "
                f"layer and {row['content_last']:.1%} after the last, boxes by {row['box_queries']:.3f}; over images, "
                f"memory by {row['memory_images']:.1%}, contents by {row['content_images']:.1%}, boxes by "
                f"{row['box_images']:.3f}"
            ),
        )
        self.write(
            "spread",
            plots.draw_spread(rows),
            "Spread of the queries",
            "By how much contents differ, relative to their length: those of an image's queries after the first and "
            "the last decoder layer, those of a query over images after the last, and the encoder's tokens over "
            "images; and by how much boxes differ, relative to the image: those of an image's queries, and those of a "
            f"query over images. Root mean squares over {self.images} images of the evaluation set, group 0; seed "
            f"{self.optimization.seed}.",
            rows,
            rows,
        )
