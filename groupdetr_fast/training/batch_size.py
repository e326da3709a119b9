"""The largest batch that a device has memory for, found by trying."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from ..targets import StepTotals
from .config import OptimizationConfig
from .device_step import bare_optimizer
from .ema import AveragedWeights
from .faults import TrainingError
from .freezing import freeze
from .half_weights import forward_precision
from .optimization import build_optimizer
from .passes import GroupPasses
from .recompute import recompute_decoder_layers

__all__ = ["TrialSteps", "check_auto", "found_batch_size", "largest_fitting", "memory_of"]

AIM = 0.8  # of the memory: sizes vary from batch to batch, and the pieces in between are lost


class Memory(Protocol):
    """The memory of a device."""

    def clear(self) -> None:
        """Give back what nothing uses, and count the peak anew."""

    def peak(self) -> float:
        """The share of the memory that was taken at most since then."""


class GpuMemory:
    """The memory of a CUDA GPU that other programs leave.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()
        free, _ = torch.cuda.mem_get_info(device)
        self.available = free + torch.cuda.memory_reserved(device)

    def clear(self) -> None:
        clear_device_cache(garbage_collection=True)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        return torch.cuda.max_memory_reserved(self.device) / self.available


def memory_of(device: torch.device) -> Memory:
    """The memory of a device.

    Raises:
        ValueError: for other devices than CUDA GPUs: their memory cannot be measured, or is the whole machine's.
    """
    if device.type != "cuda":
        raise ValueError(
            f"batch_size auto goes by the memory of a CUDA GPU, and this training runs on {device.type}: give "
            "batch_size a number (the default is 2)"
        )
    return GpuMemory(device)


def check_auto(accelerator: Accelerator, config: OptimizationConfig) -> None:
    """Refuse at once what :func:`found_batch_size` would refuse; does nothing where the batch size is a number.

    Raises:
        ValueError: with the reason.
    """
    if config.batch_size != "auto":
        return
    memory_of(accelerator.device)
    if config.cuda_graphs:
        raise ValueError("batch_size auto does not know what cuda_graphs keep in memory: give batch_size a number")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"batch_size auto is for one process or DistributedDataParallel, and not for "
            f"{accelerator.distributed_type.value}: give batch_size a number"
        )
    if config.images_per_step % accelerator.num_processes:
        raise ValueError(
            f"{accelerator.num_processes} processes cannot share images_per_step={config.images_per_step} evenly: give "
            "images_per_step a multiple"
        )


def found_batch_size(
    accelerator: Accelerator, config: OptimizationConfig, run: Callable[[int], None]
) -> tuple[int, int]:
    """Images per batch and batches per optimiser step, so that a step has ``images_per_step`` images.

    Every process must call this; all of them get the smallest numbers that any has found.

    Args:
        accelerator: of the training.
        config: how to train; :func:`check_auto` has passed it.
        run: steps with batches of this size, such as :class:`TrialSteps`; processes exchange nothing in them.

    Raises:
        TrainingError: if the memory of a process is too small for one image.
    """
    share = config.images_per_step // accelerator.num_processes
    batch_size = min(gather_object([largest_fitting(run, memory_of(accelerator.device), share)]))
    if batch_size == 0:
        raise TrainingError(
            "the device has not enough memory for a step on one image: pass --groups-per-pass 1, --recompute-layers or "
            "--precision bf16, or smaller images"
        )
    return batch_size, share // batch_size


def largest_fitting(run: Callable[[int], None], memory: Memory, share: int) -> int:
    """The largest divisor of ``share`` whose steps leave a fifth of the memory free; 0 if it does not hold one image.

    The divisors are tried from the smallest on, until one takes more; a single image may take all. Accelerate's
    ``find_executable_batch_size`` only goes down, and up to the last byte.

    Args:
        run: steps of this size.
        memory: of the device.
        share: images of a process per optimiser step.
    """

    def peak(size: int) -> float:
        memory.clear()
        try:
            run(size)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            return float("inf")
        finally:
            taken = memory.peak()
            memory.clear()  # once more after the error is gone, whose frames hold tensors: before the next size
        return taken

    first = peak(1)
    if first > AIM:
        return int(first < 1)
    fits = 1
    for size in (size for size in range(2, share + 1) if share % size == 0):
        if peak(size) > AIM:
            break
        fits = size
    return fits


class TrialSteps:
    """Optimiser steps of a model that is thrown away; they take as much memory as those of a training.

    Weights do not change, and nothing is exchanged between processes: one that runs out of memory would leave the
    others waiting. The buckets in which DistributedDataParallel exchanges gradients are there all the same.

    Args:
        accelerator: of the training, which prepares nothing here.
        model: like the one to train.
        criterion: of the model.
        config: how to train.
        make_batch: a batch of so many images, on the host.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Callable[..., dict[str, Tensor]],
        config: OptimizationConfig,
        make_batch: Callable[[int], Any],
    ):
        self.accelerator = accelerator
        self.config = config
        self.make_batch = make_batch
        self.criterion = criterion
        if config.freeze:
            freeze(model, config.freeze)
        if config.recompute_layers:
            recompute_decoder_layers(model)
        self.model = model.to(accelerator.device).train()
        self.passes = GroupPasses(model, criterion, config.groups_per_pass) if config.groups_per_pass else None
        self._in_precision = forward_precision(model, accelerator, compiled=config.compile)
        self.optimizer = build_optimizer(model, config)
        # By this AdamW makes its state and leaves the weights as they are, even if a gradient is not finite.
        adam: Any = bare_optimizer(self.optimizer)
        adam.found_inf = torch.ones((), device=accelerator.device)
        self.average = AveragedWeights(model, config.ema_decay) if config.ema_decay else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buckets = [torch.empty_like(each) for each in trained] if accelerator.num_processes > 1 else []

    def __call__(self, size: int) -> None:
        """A step of one batch, and then, when the optimiser has its state, one of two batches."""
        self.optimizer.zero_grad()
        batch = self.make_batch(size).to(self.accelerator.device)
        for batches in (1, 2):
            totals = StepTotals(batch.targets.num_targets.sum().float().clamp(min=1), batch.targets.sizes * batches)
            for _ in range(batches):
                self._pass(batch, totals)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or float("inf"))
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self.optimizer.zero_grad()

    def _pass(self, batch: Any, totals: StepTotals) -> None:
        if self.passes is not None:
            self.passes(batch.images, batch.masks, batch.targets, totals, autocast=self._in_precision)
            return
        with self._in_precision():
            output = self.model(batch.images, batch.masks, batch.targets)
        self.criterion(output, batch.targets, totals)["loss"].backward()
