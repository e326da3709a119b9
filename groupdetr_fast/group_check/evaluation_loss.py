"""Whether the loss of evaluation mode is that of one group, by counting the queries that are matched."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .nested import find_tensors
from .quiet import Modes
from .structure import SEED, Output, Structure
from .subject import Subject, in_short

__all__ = ["EvaluationLoss", "measure_evaluation_loss"]


@dataclass(frozen=True)
class EvaluationLoss:
    """The losses of the batch, and how many of its queries they match.

    Attributes:
        value: the loss of evaluation mode.
        one_group: the loss of one group on the same outputs, where that could be computed otherwise; None where not.
        matched_training, matched_evaluation: rows of ``output`` with a gradient, in the two modes. Boxes have one where
            they are matched, so that K groups have K times as many as one.
        output: what was counted in.
        num_groups: K.
    """

    value: float
    one_group: float | None
    matched_training: int
    matched_evaluation: int
    output: str
    num_groups: int

    @property
    def is_of_one_group(self) -> bool:
        """Whether evaluation matches a K-th of the queries of training."""
        return self.matched_training == self.num_groups * self.matched_evaluation


def measure_evaluation_loss(subject: Subject, modes: Modes, structure: Structure) -> EvaluationLoss | str:
    """Take the losses of both modes.

    Returns:
        What was measured, or the reason why nothing could be.
    """
    outputs = [output for output in structure.query_outputs if output.in_evaluation]
    modes.training()
    training = _count_matched(subject, outputs)
    if isinstance(training, str):
        return training
    modes.evaluation()
    evaluation = _count_matched(subject, outputs)
    if isinstance(evaluation, str):
        return evaluation
    counts, value = training[0], evaluation[1]
    sparse = [name for name, (count, rows) in counts.items() if 0 < count < rows and name in evaluation[0]]
    if not sparse:
        return "no output has a gradient at the matched queries alone, as boxes have"
    name = min(sparse, key=lambda each: counts[each][0])
    one_group = None if subject.one_group_loss is None else subject.one_group_loss()
    return EvaluationLoss(value, one_group, counts[name][0], evaluation[0][name][0], name, structure.num_groups)


def _count_matched(subject: Subject, outputs: list[Output]) -> tuple[dict[str, tuple[int, int]], float] | str:
    """Rows with a gradient and rows in all, by output, and the loss; or why there are none."""
    torch.manual_seed(SEED)
    returned = subject.forward(subject.inputs)
    mode = "training" if subject.model.training else "evaluation"
    try:
        loss = subject.loss_of(returned)
    except Exception as error:  # of foreign code
        return f"the loss fails in {mode} mode: {in_short(error)}"
    if loss is None or not loss.requires_grad:
        return "no loss is known: none was given, and the outputs hold none"
    found = find_tensors(returned)
    held = {output.name: output for output in outputs if output.name in found and found[output.name].requires_grad}
    gradients = torch.autograd.grad(loss, [found[name] for name in held], allow_unused=True)
    counts = {
        name: _count_rows(gradient, output)
        for (name, output), gradient in zip(held.items(), gradients, strict=True)
        if gradient is not None
    }
    return counts, float(loss.detach())


def _count_rows(gradient: Tensor, output: Output) -> tuple[int, int]:
    """Rows, of every image and layer, that have a gradient, and all of them; the last dimensions are a row's values."""
    last = max(output.batch_dim, output.query_dim or 0)
    touched = (gradient != 0).flatten(last + 1).any(-1) if gradient.dim() > last + 1 else gradient != 0
    return int(touched.sum()), touched.numel()
