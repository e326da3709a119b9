"""An optimiser step with the loss scaler of fp16, in which the host decides."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .device_step import DeviceStep

__all__ = ["ScaledStep"]


class ScaledStep(DeviceStep):
    """A step that the scaler may leave out, since a gradient overflows now and then; it then lowers the scale.

    Only the scale tells what the scaler has found, so that the host reads it after every step.

    Args:
        *arguments: as for :class:`~groupdetr_fast.training.device_step.DeviceStep`; the optimiser is Accelerate's
            wrapper, which calls the scaler.
        scaler: of the losses.
    """

    def __init__(self, *arguments: Any, scaler: torch.amp.GradScaler):
        super().__init__(*arguments)
        self.scaler = scaler

    def _is_broken(self, loss: Tensor, norm: Tensor) -> Tensor:
        return ~loss.isfinite()  # what gradients are too large, the scaler finds

    def _take(self, broken: Tensor, statistics: Sequence[tuple[Tensor, Tensor]]) -> bool:
        overflowed = False
        if broken:
            self.scaler.update()
        else:
            scale = self.scaler.get_scale()
            self.optimizer.step()
            overflowed = self.scaler.get_scale() < scale
        if broken or overflowed:
            for buffer, before in statistics:
                buffer.copy_(before)
        elif self.average is not None:
            self.average.update()
        return overflowed
