"""What the processes of a training agree on; every process must call these functions at the same time."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .step_losses import Losses

__all__ = ["agreed", "anywhere", "mean_losses", "on_main_process"]

T = TypeVar("T")


def agreed(accelerator: Accelerator, flags: Tensor) -> Tensor:
    """Where a flag is set in any process; the host does not wait.

    Args:
        accelerator: of the training.
        flags: ``[flags]`` bool, on its device.
    """
    return accelerator.reduce(flags.float(), "sum") > 0


def anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether a flag of the host is set in any process: so all of them stop, or none."""
    if accelerator.num_processes == 1:
        return flag
    return bool(agreed(accelerator, torch.tensor([flag], device=accelerator.device)))


def mean_losses(losses: Losses) -> dict[str, Tensor]:
    """Means over processes, on the CPU: the losses of all their images.

    A loss that a process lacks is 0 there, such as that of denoising queries where no image has an object.
    """
    parts = gather_object([(losses.names, losses.values.cpu())])
    total = sum((Losses(*part) for part in parts), start=Losses())
    return {name: value / len(parts) for name, value in total.by_name().items()}


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function in the main process alone, and return its result in every process.

    An error is raised in every process, so that none waits for one that has ended.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    result: T
    result, raised = outcome
    if raised is not None:
        raise raised
    return result
