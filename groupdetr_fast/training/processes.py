"""What the processes of a training agree on; every process must call these functions at the same time."""

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .passes import add_losses

__all__ = ["anywhere", "mean_losses"]


def anywhere(accelerator: Accelerator, flag: Tensor) -> bool:
    """Whether a flag is set in any process: so all of them skip a step or stop, or none."""
    return bool(accelerator.reduce(flag.float(), "sum"))


def mean_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over processes, on the CPU: the losses of all their images.

    A loss that a process lacks is 0 there, such as that of denoising queries where no image has an object.
    """
    parts = gather_object([{name: value.cpu() for name, value in losses.items()}])
    return {name: total / len(parts) for name, total in add_losses(*parts).items()}
