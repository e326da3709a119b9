"""A training step of a detector, and steps in which others' parts stand in the place of ours.

What a step is, step.py says, which times these.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import groupdetr_fast as gd
from groupdetr_fast import ops
from groupdetr_fast.layers import attention as layers_attention
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.device_step import DeviceStep, HostCopy, StepOutcome
from groupdetr_fast.training.graph_sizes import GraphSizes
from groupdetr_fast.training.graphs import WARM_UP, CapturableStep, StepGraphs, StepInputs
from groupdetr_fast.training.half_weights import HalfWeights
from groupdetr_fast.training.optimization import build_optimizer, build_scheduler
from groupdetr_fast.training.passes import GroupPasses
from groupdetr_fast.training.step_losses import Losses
from harness import naive
from harness.cases import Detection
from harness.results import OURS

from .recorder import Recorder

__all__ = [
    "TOLERANCE",
    "Batch",
    "GraphedStep",
    "PeerCriterion",
    "Step",
    "Training",
    "attending_by_torch",
    "cast_one_by_one",
    "criterion_of",
    "difference",
    "folded",
    "in_graph",
    "in_passes",
    "masked",
]

CONFIG = OptimizationConfig(precision="bf16")
TINY = {
    "backbone": "conv:8-8-8-8",
    "num_queries": 8,
    "d_model": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dim_feedforward": 32,
}
TOLERANCE = 0.02  # of bf16, relative


class Training:
    """A detector and what trains it."""

    def __init__(self, name: str, num_groups: int, recorder: Recorder):
        torch.manual_seed(0)
        self.name, self.num_groups, self.device = name, num_groups, recorder.device
        overrides = TINY if recorder.rehearsal else {}
        model = gd.build_model(name, num_classes=91, num_groups=num_groups, backbone_weights=None, **overrides)
        self.model = model.to(self.device)
        normalize_like_trained(self.model.eval(), self.device)
        self.model.train()
        self.criterion = gd.build_criterion(self.model)
        self.optimizer = build_optimizer(self.model, CONFIG)
        self.scheduler = build_scheduler(self.optimizer, CONFIG, steps_per_epoch=1000)
        self.parameters = list(self.model.parameters())
        self.weights = HalfWeights(self.model, torch.bfloat16)
        self.step = DeviceStep(lambda gradients: gradients[0](), self.model, self.optimizer)
        self.sums = Losses()

    @property
    def static_bytes(self) -> int:
        """Weights and state of the optimiser."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, states)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def normalize_like_trained(model: nn.Module, device: torch.device) -> None:
    """Give frozen batch norms the statistics of random images.

    Those of an untrained ResNet normalise nothing: each block doubles the variance, the last one returns thousands, and
    in bf16 the gradient of attention over such features grows from step to step.
    """

    def measure(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    images = torch.randn(2, 3, 256, 256, device=device)
    with torch.no_grad():
        model(images, torch.zeros(2, 256, 256, dtype=torch.bool, device=device))
    for hook in hooks:
        hook.remove()


class Batch:
    """Images on the device, and their targets on the host."""

    def __init__(self, size: int, recorder: Recorder):
        case = Detection(batch=size, height=800, width=1333)
        images, masks, self.targets = (case.small() if recorder.rehearsal else case).make()
        self.size, self.device = size, recorder.device
        self.images, self.masks = images.to(self.device), masks.to(self.device)

    def packed(self) -> gd.PackedTargets:
        return gd.PackedTargets.from_list(self.targets).to(self.device, non_blocking=True)

    def listed(self) -> list[dict[str, Tensor]]:
        return [{name: value.to(self.device, non_blocking=True) for name, value in t.items()} for t in self.targets]


class PeerCriterion:
    """A criterion of bench_criterion.py for a batch of this file."""

    def __init__(self, contender: str, num_groups: int):
        self.contender = contender
        self.num_groups = num_groups

    @cached_property
    def peer(self) -> Any:
        from cpu import bench_criterion  # here, as a peer may be missing

        return bench_criterion.CONTENDERS[self.contender](Detection(num_groups=self.num_groups))

    def __call__(self, output: gd.DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        # Peers compute in the predictions' precision; matching costs in bf16 would not be comparable.
        output = replace(output, logits=output.logits.float(), boxes=output.boxes.float())
        return self.peer.loss(output, batch.listed())


def _ignore(part: str) -> None:
    """Marks nothing."""


@dataclass(frozen=True)
class Step:
    """A training step, and whose parts it is made of.

    Attributes:
        contender: its name.
        attention: in the place of ``ops.grouped_attention``.
        attends_by_torch: to images, by the kernel that torch chooses: on an H200 in half precision cuDNN's.
        criterion: in the place of the detector's own.
        cast_at_once: whether weights are cast all at once, as the training loop does where nothing is compiled.
        compiled: in the place of the detector's methods of these names.
        groups_per_pass: as in OptimizationConfig.
        checked: whether the host looks at what became of the step before, as the training loop does. Without it the
            host never waits.
        mark: called with the name of each part at its end.
    """

    training: Training
    batch: Batch
    contender: str = OURS
    attention: Callable[..., Tensor] | None = None
    attends_by_torch: bool = False
    cast_at_once: bool = True
    criterion: Callable[[gd.DetectorOutput, Batch], dict[str, Tensor]] | None = None
    compiled: tuple[tuple[str, Callable[..., Any]], ...] = ()
    groups_per_pass: int = 0
    checked: bool = True
    mark: Callable[[str], None] = _ignore
    flags: list[HostCopy] = field(default_factory=list)  # of the last step

    @property
    def fields(self) -> dict[str, Any]:
        training = self.training
        fields = {"model": training.name, "groups": training.num_groups, "batch": self.batch.size}
        return {**fields, "contender": self.contender}

    def __call__(self) -> Tensor:
        """Returns the loss.

        Raises:
            AssertionError: if loss or gradient of the step before were not finite.
        """
        training = self.training
        self.mark("start")
        outcome = training.step([self._gradients])
        self._check(outcome)
        training.sums += outcome.losses
        training.scheduler.step()
        self.mark("optimiser")
        return outcome.losses["loss"]

    def _gradients(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        with self.patched():
            losses = self._add_gradients()
        return [losses], nn.utils.clip_grad_norm_(self.training.parameters, CONFIG.clip_norm)

    def _check(self, outcome: StepOutcome) -> None:
        """Look at the step before, when this one is launched."""
        if self.checked:
            assert not (self.flags and self.flags.pop().tolist()[0]), "the loss or the gradient is not finite"
            self.flags.append(HostCopy(outcome.flags))

    def losses(self) -> dict[str, Tensor]:
        """What it computes without dropout."""
        training, batch = self.training, self.batch
        training.model.eval()
        torch.manual_seed(0)  # of denoising queries
        try:
            with self.patched():
                if self.groups_per_pass:
                    losses = self._add_gradients()
                    training.optimizer.zero_grad()
                    return losses
                with torch.no_grad():
                    targets = batch.packed()
                    with self._autocast():
                        output = training.model(batch.images, batch.masks, targets, num_groups=training.num_groups)
                    return self._losses(output, targets)
        finally:
            training.model.train()

    def criterion_alone(self) -> Callable[[], Any]:
        """Loss and its gradient, for predictions that do not change."""
        targets = self.batch.packed()
        with torch.no_grad(), self._autocast():
            output = self.training.model(self.batch.images, self.batch.masks, targets)
        leaves = [tensor.detach().requires_grad_() for tensor in (output.logits, output.boxes)]
        output = replace(output, logits=leaves[0], boxes=leaves[1])
        return lambda: torch.autograd.grad(self._losses(output, targets)["loss"], leaves)

    def forget(self) -> None:
        """Free what a step that failed has left behind, as far as the device still answers."""
        with contextlib.suppress(Exception):
            self.training.optimizer.zero_grad()
            gc.collect()
            if self.batch.device.type == "cuda":
                torch.cuda.empty_cache()

    def _add_gradients(self) -> dict[str, Tensor]:
        targets = self.batch.packed()
        losses = self._pass_over_groups(targets) if self.groups_per_pass else self._pass_at_once(targets)
        return {name: value.detach() for name, value in losses.items()}

    def _pass_over_groups(self, targets: gd.PackedTargets) -> dict[str, Tensor]:
        batch, training = self.batch, self.training
        passes = GroupPasses(training.model, training.criterion, self.groups_per_pass)
        return passes(batch.images, batch.masks, targets, StepTotals.of([targets]), autocast=self.in_precision)

    def _pass_at_once(self, targets: gd.PackedTargets) -> dict[str, Tensor]:
        with self.in_precision():
            output = self.training.model(self.batch.images, self.batch.masks, targets)
        self.mark("decoder")
        losses = self._losses(output, targets)
        self.mark("criterion")
        losses["loss"].backward()
        self.mark("backward")
        return losses

    def _losses(self, output: gd.DetectorOutput, targets: gd.PackedTargets) -> dict[str, Tensor]:
        if self.criterion is not None:
            return self.criterion(output, self.batch)
        return self.training.criterion(output, targets, StepTotals.of([targets]))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.batch.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def in_precision(self) -> Iterator[None]:
        """A context for a forward pass."""
        at_once = self.cast_at_once and not self.compiled
        with self._autocast(), self.training.weights.cast() if at_once else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """A context in which the parts stand where they belong."""
        with contextlib.ExitStack() as stack:
            if self.attention is not None:
                stack.enter_context(mock.patch.object(ops, "grouped_attention", self.attention))
            if self.attends_by_torch:
                stack.enter_context(mock.patch.object(layers_attention, "is_preferred", return_value=False))
                attention = F.scaled_dot_product_attention
                stack.enter_context(mock.patch.object(layers_attention, "attend_under_mask", attention))
            for name, function in self.compiled:
                stack.enter_context(mock.patch.object(self.training.model, name, function))
            yield


@dataclass(frozen=True)
class GraphedStep(Step):
    """A step that the host launches as one CUDA graph, as the training loop does; on the CPU nothing is captured.

    Images and targets have the sizes of the batch, so that the GPU does the work of a step without a graph.

    Attributes:
        graphs: the one graph.
        plain: the step that it is a graph of.
    """

    graphs: StepGraphs = field(kw_only=True)
    plain: Step = field(kw_only=True)

    def __call__(self) -> Tensor:
        """See :meth:`Step.__call__`; the error is that of the step before."""
        training = self.training
        outcome = self._launch()
        self._check(outcome)
        training.sums += outcome.losses
        training.scheduler.step()
        return outcome.losses["loss"]

    def _launch(self) -> StepOutcome:
        outcome = self.graphs.run([StepInputs(self.batch.images, self.batch.masks, self.batch.packed())])
        assert outcome is not None, "the batch has no graph"
        return outcome

    def difference(self) -> float:
        """How far the loss of a graph is from that of the same step without one, relative to it.

        Raises:
            AssertionError: if that is too far, or the last step was skipped.
        """
        for _ in range(WARM_UP + 1):
            self()
        torch.manual_seed(0)  # graphs draw the numbers that the generator would give without them
        with torch.no_grad(), self.plain.patched(), self._autocast():
            targets = self.batch.packed()
            output = self.training.model(self.batch.images, self.batch.masks, targets)
            expected = self._losses(output, targets)["loss"].item()
        torch.manual_seed(0)
        outcome = self._launch()
        assert outcome.replayed, "the step was no graph"
        assert not outcome.broken, "the loss or the gradient is not finite"
        off = abs(outcome.losses["loss"].item() - expected) / abs(expected)
        assert off <= 10 * TOLERANCE, f"the loss differs by {off:.2g} of its value"
        return off


def in_graph(step: Step) -> GraphedStep:
    """The same step as a graph."""
    training, batch = step.training, step.batch
    name = "CUDA graph" if step.contender == OURS else f"CUDA graph, {step.contender}"

    def add_gradients(batches: Sequence[StepInputs]) -> tuple[list[dict[str, Tensor]], Tensor]:
        (inputs,) = batches
        with step.patched(), step.in_precision():
            output = training.model(inputs.images, inputs.masks, inputs.targets)
        losses = training.criterion(output, inputs.targets, StepTotals.of([inputs.targets]))
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(training.parameters, CONFIG.clip_norm)
        return [{name: value.detach() for name, value in losses.items()}], norm

    sizes = GraphSizes(1, image_multiple=1, targets=(batch.packed().max_targets,))
    graphs = StepGraphs(CapturableStep(add_gradients, training.model, training.optimizer), sizes)
    return GraphedStep(training, batch, name, graphs=graphs, plain=step)


def masked(training: Training, batch: Batch) -> Step:
    return Step(training, batch, "masked SDPA", attention=naive.masked_sdpa)


def attending_by_torch(training: Training, batch: Batch) -> Step:
    """On CPUs it is as it was, since torch's attention serves them."""
    return Step(training, batch, "torch's attention to images", attends_by_torch=True)


def cast_one_by_one(training: Training, batch: Batch) -> Step:
    """As autocast does by itself: each weight where it is used, and each of their gradients."""
    return Step(training, batch, "weights cast one by one", cast_at_once=False)


def folded(training: Training, batch: Batch) -> Step:
    return Step(training, batch, "folded SDPA", attention=naive.folded_sdpa)


def criterion_of(contender: str, training: Training, batch: Batch) -> Step:
    criterion = PeerCriterion(contender, training.num_groups)
    return Step(training, batch, f"criterion of {contender}", criterion=criterion)


def in_passes(training: Training, batch: Batch) -> Step:
    return Step(training, batch, "groups_per_pass=1", groups_per_pass=1)


def difference(step: Step) -> float:
    """How far a step's losses, and its attention, are from this package's, relative to them.

    Raises:
        AssertionError: if that is too far.
    """
    if step.contender == OURS:
        assert step.losses()["loss"].isfinite(), "the loss is not finite"
        return 0.0
    if isinstance(step, GraphedStep):
        return step.difference()
    expected = Step(step.training, step.batch).losses()
    losses, names, off = step.losses(), ["loss"], 0.0
    if step.criterion is not None:  # peers have other class losses
        names = [name for name in expected if name.startswith(("loss_bbox", "loss_giou"))]
    if step.attention is not None:
        off = difference_of_attention(step)
        assert off <= TOLERANCE, f"attention differs by {off:.2g} of its norm"
    for name in names:
        off_loss = ((losses[name] - expected[name]).abs() / expected[name].abs()).item()
        assert off_loss <= TOLERANCE, f"{name} differs by {off_loss:.2g} of its value"
        off = max(off, off_loss)
    return off


def difference_of_attention(step: Step) -> float:
    """Of random queries: those of an untrained detector are so much alike that its loss hardly knows of groups."""
    calls = []

    def spy(*arguments: Any, dropout_p: float) -> Tensor:
        calls.append(arguments)
        return step.attention(*arguments, dropout_p=dropout_p)

    replace(step, attention=spy).losses()
    *tensors, groups = calls[0]
    tensors = [torch.randn_like(tensor) for tensor in tensors]
    expected = ops.grouped_attention(*tensors, groups).float()
    return ((step.attention(*tensors, groups).float() - expected).norm() / expected.norm()).item()
