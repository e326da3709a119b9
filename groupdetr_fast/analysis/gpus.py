"""The GPUs that the runs of a sweep share, and what of their memory is in use."""

import os
import subprocess
from dataclasses import dataclass, field

import torch

__all__ = ["GpuError", "SharedGpu", "shared_gpus"]

DEFAULT_MEMORY_SHARE = 0.9  # of what is free when the sweep begins


class GpuError(ValueError):
    """A GPU whose memory cannot be read."""


@dataclass
class SharedGpu:
    """A GPU that several processes use side by side.

    Attributes:
        name: index or UUID, for ``CUDA_VISIBLE_DEVICES``.
        memory_limit: bytes that may be in use on it, those of other programs included.
        runs: runs that are at work on it.
        most_runs: runs that it had room for, as far as it is known.
    """

    name: str
    memory_limit: float
    runs: int = 0
    most_runs: int | None = None
    _used_by_others: int = field(default=0, repr=False)
    _largest: float = field(default=0.0, repr=False)  # memory of a run, as far as seen

    @classmethod
    def of(cls, name: str, memory_gib: float | None) -> "SharedGpu":
        """A GPU with a limit for all runs together, or for None with 90 % of what is free now."""
        used, total = _memory(name)
        limit = (total - used) * DEFAULT_MEMORY_SHARE if memory_gib is None else memory_gib * 2**30
        return cls(name, used + limit, _used_by_others=used)

    def environment(self) -> dict[str, str]:
        """What a process needs to see this GPU alone; the order is that of nvidia-smi."""
        return {"CUDA_VISIBLE_DEVICES": self.name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def look(self) -> None:
        """Take note of the memory in use."""
        if self.runs:
            used, _ = _memory(self.name)
            self._largest = max(self._largest, (used - self._used_by_others) / self.runs)

    def has_room(self, first_is_known: bool) -> bool:
        """Whether one more run of the largest size that was seen fits.

        Args:
            first_is_known: whether some run has trained an epoch and so has its full size; before, one works alone.
        """
        if self.runs == 0:
            return True
        if not first_is_known or (self.most_runs is not None and self.runs >= self.most_runs):
            return False
        return self._used_by_others + (self.runs + 1) * self._largest <= self.memory_limit

    def was_full(self) -> None:
        """Take note that a run did not fit beside those that are at work."""
        self.most_runs = max(1, self.runs)


def shared_gpus(memory_gib: float | None) -> list[SharedGpu]:
    """The GPUs that this process may use; none where there are none.

    Args:
        memory_gib: limit on each GPU for all runs together, in GiB; by default 90 % of what is free now.

    Raises:
        GpuError: if nvidia-smi does not say how much memory is in use.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if visible is None else visible.split(",")[:count]
    return [SharedGpu.of(name.strip(), memory_gib) for name in names]


def _memory(name: str) -> tuple[int, int]:
    """Bytes in use and in all."""
    command = ["nvidia-smi", "-i", name, "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        used, total = (int(number) * 2**20 for number in done.stdout.strip().split(","))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise GpuError(
            f"nvidia-smi does not say how much memory of GPU {name} is in use ({error}); for runs on the CPU set "
            "CUDA_VISIBLE_DEVICES to nothing"
        ) from None
    return used, total
