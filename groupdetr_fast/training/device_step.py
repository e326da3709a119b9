"""An optimiser step in which the host decides nothing, so that it need not wait for the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .ema import AveragedWeights
from .step_losses import Losses

__all__ = ["AddGradients", "DeviceStep", "HostCopy", "RunningStatistics", "StepOutcome", "bare_optimizer"]

# Called with the batches of a step; adds the gradients of its losses to those of the parameters, clips them, and
# returns each batch's losses and the gradient's norm before it was clipped.
AddGradients = Callable[[Sequence[Any]], tuple[list[dict[str, Tensor]], Tensor]]


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step, in tensors that the host has not waited for.

    Attributes:
        losses: summed over the batches of the step.
        of_batches: ``[batches]``, the loss of each batch.
        norm: scalar, of the gradient before it was clipped.
        flags: ``[1]`` bool: whether the loss or the gradient was not finite, so that the step has changed nothing. With
            several processes ``[3]``, each of which is set if any process sets it; the second: it was asked to stop,
            the third: it is time for a checkpoint.
        overflowed: whether a loss scaler has left out the step; None without one.
        replayed: whether it was a CUDA graph.
    """

    losses: Losses
    of_batches: Tensor
    norm: Tensor
    flags: Tensor
    overflowed: bool | None = None
    replayed: bool = False

    @property
    def broken(self) -> Tensor:
        """Scalar bool, the first of the flags."""
        return self.flags[0]

    def of_replay(self) -> "StepOutcome":
        """A copy, which the next replay does not overwrite."""
        losses = Losses(self.losses.names, self.losses.values.clone())
        rest = {name: getattr(self, name).clone() for name in ("of_batches", "norm", "flags")}
        return replace(self, losses=losses, **rest, replayed=True)


class HostCopy:
    """A few numbers on their way from the device to the host."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.device.type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """The numbers; the host waits for them, and for nothing that was enqueued later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class RunningStatistics:
    """What a forward pass changes in a model that trains: the statistics of its batch norms.

    Args:
        model: its modules are looked up once.
    """

    def __init__(self, model: nn.Module):
        self._norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """The statistics of the norms that train at this moment, each with a copy."""
        training = (norm for norm in self._norms if norm.training)
        return [(buffer, buffer.clone()) for norm in training for buffer in norm.buffers(recurse=False)]


def bare_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser without Accelerate's wrapper, if it has one."""
    bare: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


class DeviceStep:
    """An optimiser step that is enqueued as a whole.

    A step whose loss or gradient is not finite leaves weights, state of the optimiser, averaged weights and statistics
    of batch norms as they were, by operations that every step does.

    Args:
        add_gradients: see :data:`AddGradients`.
        model: the bare model.
        optimizer: AdamW with ``fused=True``, which leaves out a step on the device if its ``found_inf`` is 1; or
            Accelerate's wrapper of it.
        average: moving average of the weights, if one is kept.
        agree: from whether this process's step is broken, a scalar bool, to the flags of :class:`StepOutcome`; None
            where there is one process.
    """

    def __init__(
        self,
        add_gradients: AddGradients,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ):
        self.add_gradients = add_gradients
        self.optimizer = optimizer
        self.average = average
        self.agree = agree
        self.device = optimizer.param_groups[0]["params"][0].device
        self._statistics = RunningStatistics(model)

    def __call__(self, batches: Sequence[Any]) -> StepOutcome:
        statistics = self._statistics.copies()
        parts, norm = self.add_gradients(batches)
        losses = Losses.summed(parts)
        broken = self._is_broken(losses["loss"], norm)
        flags = broken[None] if self.agree is None else self.agree(broken)
        overflowed = self._take(flags[0], statistics)
        self.optimizer.zero_grad()
        return StepOutcome(losses, torch.stack([part["loss"] for part in parts]), norm, flags, overflowed)

    def _is_broken(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether this process's step is to change nothing, a scalar bool."""
        return ~(loss + norm).isfinite()

    def _take(self, broken: Tensor, statistics: Sequence[tuple[Tensor, Tensor]]) -> bool | None:
        """Change weights and average if the step is not broken, else set the statistics back to what they were before.

        Returns:
            ``overflowed`` of :class:`StepOutcome`.
        """
        with self._unless(broken):
            self.optimizer.step()
        for buffer, before in statistics:
            buffer.copy_(torch.where(broken, before, buffer))
        if self.average is not None:
            self.average.update(unless=broken)
        return None

    @contextmanager
    def _unless(self, broken: Tensor) -> Iterator[None]:
        """Inside, the optimiser reads from the device whether to step."""
        adam: Any = bare_optimizer(self.optimizer)
        adam.found_inf = broken.float()
        try:
            yield
        finally:
            del adam.found_inf
