"""The command ``groupdetr analyze assignment``."""

from dataclasses import dataclass

from ...analysis import experiments, plots
from ...analysis.experiments import average
from .common import USAGES, Sweep, require_groups

__all__ = ["AssignmentCommand"]


@dataclass(frozen=True, kw_only=True)
class AssignmentCommand(Sweep):
    """Figure 1: one-to-one, naive one-to-many and group-wise one-to-many assignment with equal numbers of queries.

    Attributes:
        groups: K; the runs have K times ``num_queries`` queries, and K positives for each object where there are many.
            Takes the place of ``num_groups``.
    """

    groups: tuple[int, ...] = (1, 3, 5, 7, 11)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_groups(self.groups)

    def __call__(self) -> None:
        cells = experiments.assignment_cells(self.training(), self.groups, self.seed_range())
        rows = [experiments.result_row(*made) for made in self.make(cells)]
        summary = average(rows, ("assignment", "queries"), (*USAGES, "minutes"))
        self.write(
            "assignment",
            plots.draw_assignment(summary),
            "Figure 1: assignment and number of queries",
            "AP (COCO, 0 to 1) at the end of trainings of equal length. One-to-one and one-to-many assignment use all "
            "queries in inference, group-wise assignment those of one group. NMS drops boxes of one class that overlap "
            f"by an IoU above {self.nms_threshold:g}; {self.seeds_in_words()}",
            rows,
            summary,
        )
