"""What an output depends on that it must not: queries of other groups, other images, and the targets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .nested import find_tensors
from .quiet import Modes
from .structure import SEED, GroupParameter, Output, Structure, add_up, weigh
from .subject import Inputs, Subject

__all__ = ["Leak", "Leaks", "find_leaks"]

_SEED_OF_CHANGES = 7


@dataclass
class Leak:
    """How much an output depends on what it must not.

    Attributes:
        gradient: the largest, in absolute value; None if it was not taken.
        change: of the output, the largest that exchanging the other side makes; None if it was not tried.
        pair: (the one that sees, the one that is seen) where the gradient, or else the change, is largest.
    """

    gradient: float | None = None
    change: float | None = None
    pair: tuple[int, int] | None = None

    @property
    def found(self) -> bool:
        return any(value is not None and value != 0 for value in (self.gradient, self.change))  # a NaN too


@dataclass
class Leaks:
    """What was found.

    Attributes:
        groups, images, targets: by name of the output; ``targets`` has changes alone.
        own_gradient: of every output to the queries of its own group, the largest.
        repeats: whether two equal passes gave equal outputs; where not, no changes were looked at.
        random: whether outputs in training mode still depend on the state of the generators.
        batch_statistics: gradients between groups and between images with batch norms in training mode; None without.
        silent: groups whose outputs have no gradient to their own queries.
    """

    groups: dict[str, Leak] = field(default_factory=dict)
    images: dict[str, Leak] = field(default_factory=dict)
    targets: dict[str, Leak] = field(default_factory=dict)
    own_gradient: dict[str, float] = field(default_factory=dict)
    repeats: bool = True
    random: bool = False
    batch_statistics: tuple[float, float] | None = None
    silent: list[int] = field(default_factory=list)


def find_leaks(subject: Subject, modes: Modes, structure: Structure) -> Leaks:
    """Measure, in training mode. Outputs that depend on no group's queries are moved to ``structure.not_checked``."""
    modes.training()
    pass_ = _Pass(subject, structure)
    leaks = Leaks()
    _find_own(pass_, leaks)
    leaks.groups = {output.name: Leak(gradient=0.0) for output in structure.query_outputs}
    leaks.images = {output.name: Leak() for output in structure.outputs}
    for group in range(structure.num_groups if structure.query_outputs else 0):
        _find_gradients_of_group(pass_, leaks, group)
    for image in range(subject.batch_size):
        _find_gradients_of_image(pass_, leaks, image)
    _find_changes(subject, structure, leaks)
    if modes.batch_norms:
        modes.training(batch_statistics=True)
        leaks.batch_statistics = _with_batch_statistics(subject, structure)
        modes.training()
    return leaks


class _Pass:
    """A forward pass that gradients are taken of."""

    def __init__(self, subject: Subject, structure: Structure):
        self.structure = structure
        self.images: list[Tensor] = []

        def leaf(image: Tensor, number: int) -> Tensor:
            self.images.append(image.detach().clone().requires_grad_())
            return self.images[-1]

        inputs = subject.inputs.with_images(leaf)
        torch.manual_seed(SEED)
        try:
            outputs = subject.forward(inputs)
        except ValueError as error:  # DETR's code bases copy images in place, which must not need gradients then
            self.images.clear()
            torch.manual_seed(SEED)
            outputs = subject.forward(subject.inputs)
            structure.not_checked["gradients to pixels"] = f"{error}; images were exchanged instead"
        found = find_tensors(outputs)
        self.values = {output.name: found[output.name] for output in structure.outputs}

    def differentiable(self, outputs: list[Output]) -> list[Output]:
        return [output for output in outputs if self.values[output.name].requires_grad]

    def by_group(self, outputs: list[Output], group: int | None) -> list[float] | None:
        """The largest gradient of outputs, of one group's rows or all, to the parameters of each group."""
        structure = self.structure
        total = add_up(
            weigh(value if group is None else structure.of_group(output, value, group))
            for output in self.differentiable(outputs)
            for value in (self.values[output.name],)
        )
        if total is None:
            return None
        parameters = [each.parameter for each in structure.parameters]
        gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        largest = [0.0] * structure.num_groups
        for each, gradient in zip(structure.parameters, gradients, strict=True):
            for other in range(structure.num_groups if gradient is not None else 0):
                part = _part_of(each, gradient, structure, other)
                if part is not None:
                    largest[other] = _largest(largest[other], part)
        return largest

    def by_image(self, outputs: list[Output], image: int) -> list[float] | None:
        """The largest gradient of one image's outputs to the pixels of each image."""
        total = add_up(
            weigh(self.values[output.name].select(output.batch_dim, image)) for output in self.differentiable(outputs)
        )
        if total is None or not self.images:
            return None
        gradients = torch.autograd.grad(total, self.images, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            return None
        if self.images[0].dim() == 3:  # a list of images
            return [0.0 if gradient is None else _largest(0.0, gradient) for gradient in gradients]
        largest = [0.0] * self.images[0].shape[0]
        for gradient in gradients:
            for other in range(len(largest) if gradient is not None else 0):
                largest[other] = _largest(largest[other], gradient[other])
        return largest


def _find_own(pass_: _Pass, leaks: Leaks) -> None:
    structure = pass_.structure
    for output in structure.query_outputs:
        if not pass_.values[output.name].requires_grad:
            continue  # such as indices: changes tell
        own = pass_.by_group([output], None)
        leaks.own_gradient[output.name] = 0.0 if own is None else max(own)
        if leaks.own_gradient[output.name] == 0:
            structure.outputs.remove(output)
            structure.outputs.append(Output(output.name, output.shape, output.batch_dim, None, output.in_evaluation))
            structure.not_checked[f"{output.name} (groups)"] = "it does not depend on parameters of the groups"


def _find_gradients_of_group(pass_: _Pass, leaks: Leaks, group: int) -> None:
    """Of all outputs at once, which is 0 only if it is for each; if it is not, of each."""
    outputs = pass_.structure.query_outputs
    together = pass_.by_group(outputs, group)
    if together is None:
        return
    if together[group] == 0:
        leaks.silent.append(group)
    if not any(value != 0 for other, value in enumerate(together) if other != group):
        return
    for output in pass_.differentiable(outputs):
        _note_largest(leaks.groups[output.name], pass_.by_group([output], group), group)


def _find_gradients_of_image(pass_: _Pass, leaks: Leaks, image: int) -> None:
    outputs = pass_.structure.outputs
    together = pass_.by_image(outputs, image)
    for output in pass_.differentiable(outputs):
        leak = leaks.images[output.name]
        if together is None:
            continue
        leak.gradient = leak.gradient or 0.0
        if any(value != 0 for other, value in enumerate(together) if other != image):
            _note_largest(leak, pass_.by_image([output], image), image)


def _note_largest(leak: Leak, values: list[float] | None, seer: int) -> None:
    for other, value in enumerate(values or ()):
        if other != seer and value != 0 and not (leak.gradient or 0.0) >= value:
            leak.gradient, leak.pair = value, (seer, other)


def _find_changes(subject: Subject, structure: Structure, leaks: Leaks) -> None:
    """Exchange the queries of one group, one image, and the targets, and look for changes elsewhere."""
    before = _run(subject, subject.inputs)
    again, otherwise = _run(subject, subject.inputs), _run(subject, subject.inputs, seed=SEED + 1)
    leaks.repeats = all(_change(before[name], again[name]) == 0 for name in before)
    outputs = [output for output in structure.outputs if output.name in before and output.name in otherwise]
    leaks.random = leaks.repeats and any(_change(before[each.name], otherwise[each.name]) != 0 for each in outputs)
    if not leaks.repeats:
        return
    generator = torch.Generator().manual_seed(_SEED_OF_CHANGES)
    for group in range(structure.num_groups if structure.query_outputs else 0):
        after = _with_other_queries(subject, structure, group, generator)
        for output in structure.query_outputs:
            leak, part = leaks.groups[output.name], partial(structure.of_group, output)
            _note_changes(leak, before[output.name], after.get(output.name), group, structure.num_groups, part)
    for image in range(subject.batch_size):
        after = _run(subject, _with_other_image(subject.inputs, image, generator))
        for output in structure.outputs:
            leak, part = leaks.images[output.name], partial(_of_image, output)
            _note_changes(leak, before[output.name], after.get(output.name), image, subject.batch_size, part)
    if subject.retargeted is not None:
        after = _run(subject, subject.retargeted)
        for output in structure.query_outputs or structure.outputs:
            if output.in_evaluation:  # else it may be of denoising queries
                leaks.targets[output.name] = Leak(change=_change(before[output.name], after.get(output.name)))


def _of_image(output: Output, tensor: Tensor, image: int) -> Tensor:
    return tensor.select(output.batch_dim, image)


def _note_changes(
    leak: Leak, before: Tensor, after: Tensor | None, exchanged: int, count: int, part: Callable[[Tensor, int], Tensor]
) -> None:
    leak.change = leak.change or 0.0
    same_shape = after is not None and after.shape == before.shape
    for other in range(count):
        if other == exchanged:
            continue
        change = _change(part(before, other), part(after, other) if after is not None and same_shape else None)
        if change != 0 and not leak.change >= change:
            leak.change = change
            leak.pair = (other, exchanged) if leak.gradient in (None, 0) else leak.pair


def _run(subject: Subject, inputs: Inputs, seed: int = SEED) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return find_tensors(subject.forward(inputs))


def _with_other_queries(
    subject: Subject, structure: Structure, group: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The outputs with the parameters of one group exchanged, which are put back."""
    kept = [(each.parameter, each.parameter.detach().clone()) for each in structure.parameters]
    try:
        with torch.no_grad():
            for each in structure.parameters:
                part = _part_of(each, each.parameter, structure, group)
                if part is not None:
                    noise = torch.randn(part.shape, generator=generator, dtype=torch.float32)
                    part.add_(noise.to(part.device, part.dtype) * part.std(correction=0).clamp(min=0.1))
        return _run(subject, subject.inputs)
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)


def _with_other_image(inputs: Inputs, image: int, generator: torch.Generator) -> Inputs:
    def exchange(tensor: Tensor, number: int) -> Tensor:
        if tensor.dim() == 3 and number != image:
            return tensor
        changed = tensor.clone()
        part = changed if tensor.dim() == 3 else changed[image]
        part.add_(torch.randn(part.shape, generator=generator).to(part.device, part.dtype))  # added, to differ for sure
        return changed

    return inputs.with_images(exchange)


def _with_batch_statistics(subject: Subject, structure: Structure) -> tuple[float, float]:
    """Gradients between groups, and between images, of the first of each."""
    pass_ = _Pass(subject, structure)
    groups = pass_.by_group(structure.query_outputs, 0) if structure.query_outputs else None
    images = pass_.by_image(structure.outputs, 0)
    return max((groups or [0.0])[1:], default=0.0), max((images or [0.0])[1:], default=0.0)


def _part_of(each: GroupParameter, values: Tensor, structure: Structure, group: int) -> Tensor | None:
    """What a group has of a parameter, or of a tensor of its shape: a view; None for nothing."""
    if each.group is not None:
        return values if each.group == group else None
    if values.shape[0] != structure.length:  # [1, K * N, d] or [K, N, d]
        values = values.flatten(0, 1)
    return values[structure.rows(group)]


def _largest(least: float, values: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest if largest != largest else max(least, largest)


def _change(before: Tensor, after: Tensor | None) -> float:
    """The largest difference; infinite where the shape differs."""
    if after is None or before.shape != after.shape:
        return float("inf")
    if torch.equal(before, after) or not before.numel():
        return 0.0
    differ = (before != after) & ~((before != before) & (after != after))
    if not differ.any():
        return 0.0
    return float((before.double() - after.double())[differ].abs().max())
