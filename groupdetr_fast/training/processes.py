"""What the processes of a training agree on; every process must call these functions at the same time."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .passes import add_losses

__all__ = ["anywhere", "mean_losses", "on_main_process"]

T = TypeVar("T")


def anywhere(accelerator: Accelerator, flag: Tensor) -> bool:
    """Whether a flag is set in any process: so all of them skip a step or stop, or none."""
    return bool(accelerator.reduce(flag.float(), "sum"))


def mean_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over processes, on the CPU: the losses of all their images.

    A loss that a process lacks is 0 there, such as that of denoising queries where no image has an object.
    """
    parts = gather_object([{name: value.cpu() for name, value in losses.items()}])
    return {name: total / len(parts) for name, total in add_losses(*parts).items()}


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What a function returns that the main process alone calls; the other ones wait for it.

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
    result, error = outcome
    if error is not None:
        raise error
    return result
