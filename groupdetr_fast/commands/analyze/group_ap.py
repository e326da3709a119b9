"""The command ``groupdetr analyze group-ap``."""

from dataclasses import dataclass, replace

from ...analysis import plots
from ...analysis.experiments import average
from ...analysis.inference import evaluate_groups
from ...models.checkpoints import CheckpointHeader
from ...prediction import InferenceSettings
from ...runs.config import CocoTrainingConfig, ModelConfig
from .common import OfCheckpoint, count_of, header_of

__all__ = ["GroupApCommand"]


@dataclass(frozen=True, kw_only=True)
class GroupApCommand(OfCheckpoint):
    """AP of each group of a trained model, used alone: any group can serve (section 3.2).

    A checkpoint is evaluated as its training did.
    """

    def __call__(self) -> None:
        checkpoint = self.given_checkpoint()
        if checkpoint is None:
            models = {
                f"seed {cell.labels['seed']}": (cell.training, results.weights())
                for cell, _, results in self.make(self.own_cells(self.seed_range()))
            }
        else:
            header = header_of(checkpoint)  # first: the training may compose digits
            models = {str(checkpoint): (_as_trained(self.training(), header), checkpoint)}
        rows = [
            {"model": name, "group": group, **{key: metrics[key] for key in ("AP", "AP50", "AP75")}}
            for name, (config, checkpoint) in models.items()
            for group, metrics in enumerate(evaluate_groups(config, checkpoint))
        ]
        self.write(
            "group_ap",
            plots.draw_group_ap(rows),
            "AP of each group used alone",
            f"AP (COCO, 0 to 1) of each group of {count_of(len(models), 'trained model')}: {', '.join(models)}. "
            "Table: mean and sample standard deviation over the groups of each model.",
            rows,
            average(rows, ("model",), ("AP", "AP50", "AP75"), counted="groups"),
        )


def _as_trained(training: CocoTrainingConfig, header: CheckpointHeader) -> CocoTrainingConfig:
    """The training with the detector that a checkpoint is of, its labels, its sizes of images and its normalisation."""
    model = ModelConfig.of_checkpoint(header)
    data = replace(training.data, labels=header.labels)
    augmentation = InferenceSettings.from_header(header).augmentation
    return replace(training, model=model, data=data, augmentation=augmentation)
