"""The command ``groupdetr analyze sweep-groups``."""

from dataclasses import dataclass

from ...analysis import experiments, plots
from ...analysis.experiments import average, paired_differences
from .common import Sweep, count_of, require_groups

__all__ = ["SweepGroupsCommand"]


@dataclass(frozen=True, kw_only=True)
class SweepGroupsCommand(Sweep):
    """Tables 1 and 2: AP against the number of groups at equal epochs, and against training time.

    Attributes:
        groups: K of the runs. Takes the place of ``num_groups``.
        baseline_epochs: lengths of further trainings with one group, for a comparison at equal time.
    """

    groups: tuple[int, ...] = (1, 2, 3, 5, 7, 9, 11)
    baseline_epochs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_groups(self.groups)
        if any(epochs < 1 for epochs in self.baseline_epochs):
            raise ValueError(
                f"baseline_epochs must be numbers from 1 on, got {', '.join(map(str, self.baseline_epochs))}"
            )

    def __call__(self) -> None:
        training = self.training()
        made = self.make(experiments.group_cells(training, self.groups, self.baseline_epochs, self.seed_range()))
        rows = [experiments.result_row(*one) for one in made]
        keys = ("num_groups", "epochs")
        values = ("AP_one_group", "AP50_one_group", "AP75_one_group", "minutes", "seconds_per_epoch", "peak_memory_mib")
        summary = average(rows, keys, values)
        points = [
            {**cell.labels, "epoch": row["epoch"], "AP": row["metrics"]["AP"]}
            for cell, _, results in made
            for row in results.epochs
            if "metrics" in row
        ]
        curves = average(points, (*keys, "epoch"), ("AP",))
        epochs = training.optimization.resolved().epochs
        self.write(
            "sweep_groups",
            plots.draw_sweep(summary, curves, epochs),
            "Tables 1 and 2: the number of groups",
            f"AP (COCO, 0 to 1) of group 0: against the number of groups K after {epochs} epochs, against the epoch, "
            f"and at the end against the minutes spent in training steps, with {count_of(self.resolved_jobs(), 'run')} "
            f"at a time on {count_of(self.threads, 'thread')} each; {self.seeds_in_words()}",
            rows,
            summary,
            differences=paired_differences(rows, keys, (1, epochs), ("AP_one_group",)),
        )
