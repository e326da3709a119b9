"""The command ``groupdetr analyze reference-points``."""

from dataclasses import dataclass

from ...analysis import plots
from ...analysis.distances import query_positions
from ...analysis.experiments import average
from ...analysis.inference import load_weights
from ...models.checkpoints import build_detector
from .common import OfCheckpoint, header_of

__all__ = ["ReferencePointsCommand"]


@dataclass(frozen=True, kw_only=True)
class ReferencePointsCommand(OfCheckpoint):
    """Figure 3: the reference points of all groups over the image plane, of one run or checkpoint."""

    def __call__(self) -> None:
        checkpoint = self.given_checkpoint()
        source = f"checkpoint {checkpoint}"
        if checkpoint is None:
            _, run, results = self.make(self.own_cells([self.optimization.seed]))[0]
            checkpoint, source = results.weights(), f"run {run.name}"
        header = header_of(checkpoint)
        model = build_detector(header)
        load_weights(model, checkpoint)
        positions = query_positions(model).tolist()
        rows = [
            {"group": group, "query": query, "x": x, "y": y}
            for group, points in enumerate(positions)
            for query, (x, y) in enumerate(points)
        ]
        summary = average(rows, ("group",), ("x", "y"), counted="queries")
        self.write(
            "reference_points",
            plots.draw_reference_points(rows),
            "Figure 3: reference points of all groups",
            f"Reference points of {len(positions)} groups of {len(positions[0])} queries, relative to the image; "
            f"{source}. Table: mean and standard deviation over the queries of each group.",
            rows,
            summary,
            settings=header.model_config,
        )
