"""The command ``groupdetr analyze ablation``."""

from dataclasses import dataclass

from ...analysis import experiments, plots
from ...analysis.experiments import average, paired_differences
from .common import USAGES, Sweep

__all__ = ["AblationCommand"]


@dataclass(frozen=True, kw_only=True)
class AblationCommand(Sweep):
    """Table 7: group-wise assignment and separate self-attention, each with and without the other."""

    def __call__(self) -> None:
        made = self.make(experiments.ablation_cells(self.training(), self.seed_range()))
        rows = [experiments.result_row(*one) for one in made]
        summary = average(rows, ("variant",), (*USAGES, "minutes"))
        self.write(
            "ablation",
            plots.draw_ablation(summary),
            "Table 7: what the parts of Group DETR contribute",
            f"AP (COCO, 0 to 1) with K = {self.model.num_groups} groups, or K positives for each object: of one group "
            "used alone, of all queries, and of all queries after NMS at an IoU of "
            f"{self.nms_threshold:g}; {self.seeds_in_words()}",
            rows,
            summary,
            differences=paired_differences(rows, ("variant",), ("one group",), ("AP_one_group", "AP_all_queries_nms")),
        )
