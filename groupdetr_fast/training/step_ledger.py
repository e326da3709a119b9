"""What became of optimiser steps: counted one step late, so that the host does not wait for the device."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from .device_step import HostCopy, StepOutcome
from .faults import TrainingError
from .state import TrainingState

__all__ = ["StepLedger"]

logger = logging.getLogger(__name__)

# The first scale, 2**16, has then fallen to 2**-9: it is not what makes gradients too large.
MAX_OVERFLOWS_IN_A_ROW = 25

# Where the loss is not finite in too many steps, and where the gradient of a finite loss is not.
ADVICE = {
    "loss": "look at these images and their boxes, or lower the learning rate",
    "gradient": "lower the learning rate, or see with precision no whether half precision is the reason",
}


class StepLedger:
    """Counts steps in the state of a training, and warns of those that were skipped.

    Args:
        state: of the training.
        max_skipped_steps: how many steps of an epoch may be skipped.
        clip_norm: beyond which the gradient of a step counts as clipped; 0 for never.

    Attributes:
        stopping: whether any process was asked to stop, by the steps that were counted; the same in all processes.
        time_is_up: whether it is time for a checkpoint in any process, likewise.
    """

    def __init__(self, state: TrainingState, max_skipped_steps: int, clip_norm: float = 0.0):
        self.state = state
        self.max_skipped_steps = max_skipped_steps
        self.clip_norm = clip_norm
        self.stopping = self.time_is_up = False
        self._enqueued: _EnqueuedStep | None = None

    @property
    def begun(self) -> int:
        """Optimiser steps of the epoch, counted or not yet."""
        current = self.state.current
        return current.steps + current.skipped + current.overflowed + (self._enqueued is not None)

    def enqueue(self, batches: Sequence[Any], outcome: StepOutcome) -> None:
        """Note a step that is on its way, and count the one before it, which has ended or soon will.

        Raises:
            TrainingError: if too many steps had to be skipped.
        """
        self.settle()
        current = self.state.current
        ids = [batch.image_ids for batch in batches]
        numbers = HostCopy(torch.cat((outcome.flags, outcome.norm[None])))
        self._enqueued = _EnqueuedStep(current.batches, ids, outcome, numbers)
        current.batches += len(batches)

    def settle(self) -> None:
        """Count the step that was enqueued last, if it has not been yet; the host waits for its end.

        Raises:
            TrainingError: if too many steps had to be skipped.
        """
        step, self._enqueued = self._enqueued, None
        if step is None:
            return
        broken, *of_processes, norm = step.numbers.tolist()
        if of_processes:
            stopping, time_is_up = of_processes
            self.stopping |= bool(stopping)
            self.time_is_up |= bool(time_is_up)
        overflowed = step.outcome.overflowed
        if broken:
            self._note_skipped(step)
            return
        if not overflowed:
            current = self.state.current
            current.steps += 1
            current.sums += step.outcome.losses
            current.norms += norm
            current.clipped += 0 < self.clip_norm < norm
        if overflowed is not None:
            self._note_scaled(overflowed)

    def _note_skipped(self, step: "_EnqueuedStep") -> None:
        current, epoch, allowed = self.state.current, self.state.epoch + 1, self.max_skipped_steps
        current.skipped += 1
        finite = step.outcome.of_batches.isfinite().tolist()
        guilty = [ids for ids, well in zip(step.image_ids, finite, strict=True) if not well]
        of_loss, of_step = zip(*gather_object([(guilty, step.image_ids)]), strict=True)  # by process: all are here
        what, found = ("loss", of_loss) if any(of_loss) else ("gradient", of_step)
        ids = [image_id for of_process in found for of_batch in of_process for image_id in of_batch]
        where = f"epoch {epoch}, batches {step.first + 1} to {step.first + len(step.image_ids)}"
        logger.warning("%s: the %s is not finite: step skipped; image ids %s", where, what, ids)
        if current.skipped > allowed:
            raise TrainingError(
                f"{current.skipped} steps of epoch {epoch} had a loss or a gradient that is not finite, "
                f"and {allowed} are allowed; in the last one the {what} was not, on the image ids {ids}: {ADVICE[what]}"
            )

    def _note_scaled(self, overflowed: bool) -> None:
        """Count a step with a loss scaler."""
        current, scaler = self.state.current, self.state.accelerator.scaler
        current.overflowed += overflowed
        current.overflows_in_a_row = current.overflows_in_a_row + 1 if overflowed else 0
        if current.overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW:
            raise TrainingError(
                f"gradients overflowed in the last {current.overflows_in_a_row} steps, though the loss scale of fp16 "
                f"fell to {scaler.get_scale():g}: train with precision bf16 or no, or lower the learning rate"
            )


class _EnqueuedStep(NamedTuple):
    """A step that was launched and not looked at since."""

    first: int  # batches of the epoch before it
    image_ids: list[list[int]]  # of each batch
    outcome: StepOutcome
    numbers: HostCopy  # its flags, and the norm of its gradient
