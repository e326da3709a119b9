"""Whole optimiser steps as CUDA graphs: what the host launches once, the GPU does again for other images.

A step of a detector launches thousands of short kernels, and on a fast GPU their launches take longer than they do. A
graph has the kernels of a whole step: forward pass, matching, losses, backward pass, clipping, AdamW and averaged
weights. The host copies a batch into the tensors that the graph reads, and launches the graph.

A graph repeats kernels and their sizes, so that nothing may depend on a batch but through tensors. Images are padded to
multiples of a size, and targets to one of a few numbers per image; each combination is a graph of its own. What
denoising queries there are follows from the padded number. Whether a step is skipped is decided on the device.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ..targets import PackedTargets
from .config import OptimizationConfig
from .device_step import DeviceStep, StepOutcome
from .graph_sizes import Batch, GraphSizes, PaddedSizes

__all__ = ["WARM_UP", "CapturableStep", "StepGraphs", "StepInputs", "check_graphs"]

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before a capture: the first ones compile kernels, choose algorithms and make the optimiser's state
FEW = 0.05  # of the steps of an epoch; so many without a graph are not worth more graphs


@dataclass(frozen=True)
class StepInputs:
    """A batch in tensors whose sizes do not depend on it.

    Attributes:
        images: ``[B, 3, H, W]``, 0 on padding.
        masks: ``[B, H, W]`` bool, True on padding.
        targets: of B images, padded; ``sizes`` has the padded number for every image.
    """

    images: Tensor
    masks: Tensor
    targets: PackedTargets

    @classmethod
    def like(cls, batch: Batch, height: int, width: int, max_targets: int) -> "StepInputs":
        """Room for batches such as this one."""
        count, channels = batch.images.shape[:2]
        targets = batch.targets
        return cls(
            batch.images.new_zeros(count, channels, height, width),
            batch.masks.new_ones(count, height, width),
            PackedTargets(
                targets.labels.new_zeros(count, max_targets),
                targets.boxes.new_zeros(count, max_targets, 4),
                targets.num_targets.new_zeros(count),
                (max_targets,) * count,
            ),
        )

    def fill(self, batch: Batch) -> None:
        """Take over a batch that is no larger."""
        height, width = batch.images.shape[2:]
        if (height, width) != self.images.shape[2:]:
            self.images.zero_()
            self.masks.fill_(True)
        self.images[:, :, :height, :width].copy_(batch.images, non_blocking=True)
        self.masks[:, :height, :width].copy_(batch.masks, non_blocking=True)
        most = batch.targets.max_targets
        for name in ("labels", "boxes"):
            room = getattr(self.targets, name)
            room.zero_()
            room[:, :most].copy_(getattr(batch.targets, name), non_blocking=True)
        self.targets.num_targets.copy_(batch.targets.num_targets, non_blocking=True)


class CapturableStep(DeviceStep):
    """A step that reads even its learning rates from the device, so that a graph of it heeds the schedule.

    For the host they stay numbers, as schedulers and checkpoints have them; see :meth:`take_rates`. Arguments are those
    of :class:`DeviceStep`.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]

    def take_rates(self) -> None:
        """Let the next step have the optimiser's learning rates of now."""
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    @contextmanager
    def _unless(self, broken: Tensor) -> Iterator[None]:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"], group["capturable"] = rate, capturing
        try:
            with super()._unless(broken):
                yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"], group["capturable"] = rate, False


class StepGraphs:
    """Steps as graphs, one for each padded size that is met often enough, as many as are allowed.

    The first steps of a size run as they are, padded: they are the warm-up that a capture needs, and train like all
    others. On a CPU nothing is captured and every step runs so.

    All graphs share the memory of what they compute on the way, as no two of them run at once.

    Args:
        step: what is captured.
        sizes: which sizes have graphs.

    Attributes:
        warm_up: steps of a size before its capture.
    """

    def __init__(self, step: CapturableStep, sizes: GraphSizes):
        self.step = step
        self.sizes = sizes
        self.warm_up = WARM_UP
        on_gpu = step.device.type == "cuda"
        self._stream = torch.cuda.Stream(step.device) if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._steps = 0  # since the last advice
        self._refused: Counter[PaddedSizes | None] = Counter()  # steps since then, of sizes that were ever refused
        self._forget()

    def _forget(self) -> None:
        self._optimizer_state = self.step.optimizer.state
        self._met: dict[PaddedSizes, int] = {}
        self._graphs: dict[PaddedSizes, _Graph] = {}

    def run(self, batches: Sequence[Batch]) -> StepOutcome | None:
        """Enqueue a step; the host does not wait for it.

        Args:
            batches: of the step, on the device.

        Returns:
            What becomes of the step, in tensors of its own; None if it has not been done, as it would need a graph too
            many.

        Raises:
            ValueError: for targets with masks, whose sizes are those of images.
        """
        if any(batch.targets.masks is not None for batch in batches):
            raise ValueError("cuda_graphs are for detectors of boxes: masks of targets have sizes of their own")
        if self.step.optimizer.state is not self._optimizer_state:  # a checkpoint was loaded, into other tensors
            self._forget()
        self._steps += 1
        sizes = self.sizes.padded(batches)
        graph = None if sizes is None else self._graphs.get(sizes)
        if sizes is None or (graph is None and len(self._graphs) >= self.sizes.number):
            self._refuse(sizes, batches)
            return None
        self.step.take_rates()
        if graph is None:
            inputs = [StepInputs.like(batch, sizes.height, sizes.width, sizes.targets) for batch in batches]
            if self._met.get(sizes, 0) < self.warm_up:
                self._met[sizes] = self._met.get(sizes, 0) + 1
                return self._run_uncaptured(inputs, batches)
            graph = self._graphs[sizes] = self._capture(inputs)
        for room, batch in zip(graph.inputs, batches, strict=True):
            room.fill(batch)
        return graph.replay().of_replay()

    def _run_uncaptured(self, inputs: list[StepInputs], batches: Sequence[Batch]) -> StepOutcome:
        for room, batch in zip(inputs, batches, strict=True):
            room.fill(batch)
        if self._stream is None:
            return self.step(inputs)
        current = torch.cuda.current_stream(self.step.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = self.step(inputs)
        current.wait_stream(self._stream)
        return outcome

    def _capture(self, inputs: list[StepInputs]) -> "_Graph":
        if self._stream is None:
            return _Graph(inputs, lambda: self.step(inputs))
        graph = torch.cuda.CUDAGraph()
        # A thread that pins the memory of batches to come may allocate meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with capture:
            outcome = self.step(inputs)

        def replay() -> StepOutcome:
            graph.replay()
            return outcome

        return _Graph(inputs, replay)

    def _refuse(self, sizes: PaddedSizes | None, batches: Sequence[Batch]) -> None:
        first = sizes not in self._refused
        self._refused[sizes] += 1
        if not first:
            return
        if sizes is None:
            most = max(batch.targets.max_targets for batch in batches)
            logger.warning("steps without a graph: an image has %d targets, and graphs end at %s", most, self.sizes)
        else:
            logger.warning("steps without a graph: all %d graphs are taken, none is of %s", self.sizes.number, sizes)

    def advise(self) -> None:
        """Log what would give more of the steps since the last call a graph, unless few were without one."""
        steps, refused, self._steps = self._steps, self._refused, 0
        self._refused = Counter(dict.fromkeys(refused, 0))  # whose first steps were told of
        full = refused.pop(None, 0)
        if full > FEW * steps:
            logger.warning(
                "%d of %d steps ran without a graph, as they had an image with more than %d targets: "
                "give graph_targets a larger number",
                *(full, steps, self.sizes.targets[-1]),
            )
        left, more = refused.total(), 0
        for _, count in refused.most_common():
            if left <= FEW * steps:
                break
            left, more = left - count, more + 1
        if more:
            logger.warning(
                "%d of %d steps ran without a graph, as all %d were taken: with cuda_graphs=%d it would be %d",
                *(refused.total(), steps, self.sizes.number, self.sizes.number + more, left),
            )


class _Graph(NamedTuple):
    """A captured step: ``replay`` does it with what ``inputs`` hold, and the next replay overwrites its outcome."""

    inputs: list[StepInputs]
    replay: Callable[[], StepOutcome]


def check_graphs(accelerator: Accelerator, config: OptimizationConfig, *, observing: bool) -> None:
    """Refuse trainings whose steps the host has a part in.

    Args:
        accelerator: of the training.
        config: how it trains.
        observing: whether every batch is observed.

    Raises:
        ValueError: with the reason.
    """
    reason = None
    if accelerator.device.type != "cuda":
        reason = f"need a CUDA GPU, and this training runs on {accelerator.device.type}"
    elif accelerator.distributed_type != DistributedType.NO:
        reason = f"are for one process without DDP or FSDP, and this training is {accelerator.distributed_type.value}"
    elif accelerator.scaler is not None:
        reason = "do not work with precision fp16, whose loss scale is the host's: use bf16 or no"
    elif observing:
        reason = "do not work with observe, which looks at every batch on the host: let it have wants, to choose"
    else:
        for name in ("groups_per_pass", "recompute_layers", "compile"):
            if getattr(config, name):
                reason = f"do not work with {name}={getattr(config, name)}"
    if reason is not None:
        raise ValueError(f"cuda_graphs {reason}")
