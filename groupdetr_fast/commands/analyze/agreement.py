"""The command ``groupdetr analyze agreement``."""

from dataclasses import dataclass

from ...analysis import plots
from ...analysis.agreement import mean_agreement
from .common import OverSteps

__all__ = ["AgreementCommand"]


@dataclass(frozen=True, kw_only=True)
class AgreementCommand(OverSteps):
    """How far the gradients of the groups agree, over the first steps of a training.

    Near 1, each group repeats the gradient of the others; near 0, their sum has what no single group has.
    """

    def __call__(self) -> None:
        rows = self.rows_of(
            mean_agreement,
            lambda row: f"cosine {row['decoder']:.3f} in the decoder, loss {row['loss']:.3f}",
        )
        self.write(
            "agreement",
            plots.draw_agreement(rows),
            "Agreement of the groups' gradients",
            f"Cosine between the gradients of two groups, on average over all pairs of {self.model.num_groups} groups, "
            f"on {self.images} images of the evaluation set: of the decoder's shared parameters, and of what the "
            f"encoder receives; seed {self.optimization.seed}.",
            rows,
            rows,
        )
