"""An optimiser step with the loss scaler of fp16, in which the host decides."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .device_step import AddGradients, DeviceStep, StepOutcome
from .ema import AveragedWeights
from .step_losses import Losses

__all__ = ["ScaledStep"]


class ScaledStep(DeviceStep):
    """A step that the scaler may leave out, since a gradient overflows now and then; it then lowers the scale.

    Only the scale tells what the scaler has found, so that the host reads it after every step.

    Args:
        add_gradients, model, average, agree: as for :class:`~groupdetr_fast.training.device_step.DeviceStep`.
        optimizer: Accelerate's wrapper, which calls the scaler.
        scaler: of the losses.
    """

    def __init__(
        self,
        add_gradients: AddGradients,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None,
        agree: Callable[[Tensor], Tensor] | None,
        scaler: torch.amp.GradScaler,
    ):
        super().__init__(add_gradients, model, optimizer, average, agree)
        self.scaler = scaler

    def __call__(self, batches: Sequence[Any]) -> StepOutcome:
        statistics = self._statistics.copies()
        parts, norm = self.add_gradients(batches)
        losses = Losses.summed(parts)
        flags = self._agreed(~losses["loss"].isfinite())
        overflowed = False
        if flags[0]:
            self.scaler.update()
        else:
            before = self.scaler.get_scale()
            self.optimizer.step()
            overflowed = self.scaler.get_scale() < before
        if flags[0] or overflowed:
            for buffer, value in statistics:
                buffer.copy_(value)
        elif self.average is not None:
            self.average.update()
        self.optimizer.zero_grad()
        of_batches = torch.stack([part["loss"] for part in parts])
        return StepOutcome(losses, of_batches, norm, flags, overflowed)
