"""The command ``groupdetr analyze distances``."""

from dataclasses import dataclass

from ...analysis import plots
from ...analysis.distances import COLUMNS
from ...analysis.experiments import average
from .common import Sweep

__all__ = ["DistancesCommand"]


@dataclass(frozen=True, kw_only=True)
class DistancesCommand(Sweep):
    """Figure 4: perturbation distance and matching distance (equations 6 and 7) against the training step."""

    def __call__(self) -> None:
        cells = self.own_cells(self.seed_range())
        rows = [
            {"seed": cell.labels["seed"], **row} for cell, _, results in self.make(cells) for row in results.distances
        ]
        if not rows:
            raise ValueError("distances need at least 2 groups of queries that have learned positions, in one pass")
        steps = sorted({row["step"] for row in rows})
        shown = {steps[len(steps) * part // 8] for part in range(8)} | {steps[-1]}
        self.write(
            "distances",
            plots.draw_distances(rows),
            "Figure 4: perturbation distance (PD) and matching distance (MD)",
            f"Distances between the reference points of {self.model.num_groups} groups relative to the image, averaged "
            "over all pairs of groups; MD of the last decoder layer and the objects of one batch; "
            f"{self.seeds_in_words()}",
            rows,
            average([row for row in rows if row["step"] in shown], ("step",), COLUMNS[1:]),
        )
