"""Forward and backward passes of an optimiser step."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..targets import StepTotals
from .config import OptimizationConfig
from .half_weights import forward_precision
from .passes import GroupPasses, average_gradients
from .sharding import whole
from .state import TrainingState

__all__ = ["Observe", "StepGradients", "chooses"]

# Called as observe(number of the batch in the run, bare model, output, targets). With a method ``wants(number)`` it
# chooses the batches that it is called for; without one it is called for all.
Observe = Callable[[int, nn.Module, Any, Any], None]


def chooses(observe: Observe) -> bool:
    """Whether ``observe`` chooses the batches that it is called for."""
    return hasattr(observe, "wants")


class StepGradients:
    """Adds the gradients of a step's losses to those of the parameters, and clips them.

    Args:
        state: of the training, with the model as the accelerator prepared it.
        bare: the same model without the accelerator's wrapper.
        criterion: called as ``criterion(output, targets, totals)``.
        config: how to train.
        observe: see :class:`~groupdetr_fast.training.engine.Trainer`.

    Raises:
        ValueError: for ``groups_per_pass`` where groups cannot run in passes.
    """

    def __init__(
        self,
        state: TrainingState,
        bare: nn.Module,
        criterion: Callable[[Any, Any, StepTotals], dict[str, Tensor]],
        config: OptimizationConfig,
        observe: Observe | None = None,
    ):
        self.state = state
        self.accelerator = state.accelerator
        self.bare = bare
        self.criterion = criterion
        self.observe: Any = observe
        self.passes = None
        if config.groups_per_pass:
            self.passes = GroupPasses(bare, criterion, config.groups_per_pass)
            self._check_passes()
        self._in_precision = forward_precision(bare, self.accelerator, compiled=config.compile)
        self._parameters = list(state.model.parameters())
        self._clip_norm = config.clip_norm or math.inf

    def _check_passes(self) -> None:
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(f"groups_per_pass needs all gradients in every process, which {kind.value} does not keep")
        if self.observe is not None:
            raise ValueError("observe needs the output of all groups at once: leave groups_per_pass at 0")

    def observes(self, number: int) -> bool:
        """Whether any of the next ``number`` batches is observed."""
        return any(self._observes(self.state.batches + index) for index in range(1, number + 1))

    def _observes(self, batch: int) -> bool:
        """Whether the batch with this number in the run is observed."""
        return self.observe is not None and (not chooses(self.observe) or self.observe.wants(batch))

    def __call__(self, batches: Sequence[Any]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Returns each batch's detached losses, and the norm of the gradient before it was clipped."""
        totals = StepTotals.of([batch.targets for batch in batches])
        parts = []
        for index, batch in enumerate(batches, start=1):
            if self.passes is not None:
                parts.append(self._pass_over_groups(batch, totals))
                continue
            with nullcontext() if index == len(batches) else self.accelerator.no_sync(self.state.model):
                parts.append(self._pass_over_batch(index, batch, totals))
        if self.passes is not None:
            average_gradients(self._parameters)
        return parts, whole(self.accelerator.clip_grad_norm_(self._parameters, self._clip_norm))

    def _pass_over_batch(self, index: int, batch: Any, totals: StepTotals) -> dict[str, Tensor]:
        """Forward and backward pass of the batch with this number in the step, from 1. Returns its losses."""
        with self._in_precision():  # which FSDP's model does not have in itself
            output = self.state.model(batch.images, batch.masks, batch.targets)
        losses = self.criterion(output, batch.targets, totals)
        self.accelerator.backward(losses["loss"])
        if self.observe is not None and self._observes(self.state.batches + index):
            self.observe(self.state.batches + index, self.bare, output, batch.targets)
        return {name: value.detach() for name, value in losses.items()}

    def _pass_over_groups(self, batch: Any, totals: StepTotals) -> dict[str, Tensor]:
        """The same, some groups at a time; this goes past the wrapper that averages gradients over processes."""
        assert self.passes is not None
        functions: dict[str, Any] = {"backward": self.accelerator.backward, "autocast": self._in_precision}
        return self.passes(batch.images, batch.masks, batch.targets, totals, **functions)
