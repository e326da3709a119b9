"""The check of a model's groups, put together."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .evaluation_loss import EvaluationLoss, measure_evaluation_loss
from .leaks import Leak, Leaks, find_leaks
from .quiet import Modes, quiet
from .report import GroupReport, OutputReport, describe_leak
from .sources import find_subject
from .structure import Structure, find_structure
from .subject import Subject, in_short

__all__ = ["check_groups"]

_SHOWN = 3  # outputs that a sentence names


def check_groups(
    model: nn.Module | Callable[[], Any] | str | Path | Any,
    *,
    inputs: Any = None,
    loss: Callable[[Any], Any] | None = None,
    num_groups: int | None = None,
    batch_size: int = 2,
    image_size: tuple[int, int] | None = None,
) -> GroupReport:
    """Measure whether the groups of queries of a detector see each other in training, and images each other.

    Training and evaluation mode are compared: K is how many times as many queries training has, and what belongs to
    groups are the parameters of K * N rows of which evaluation uses those of one group, and K modules alike of which it
    uses one. Then, in training mode without dropout and with frozen batch norms, gradients are taken from the outputs
    of each group to the queries of the others, and from each image's outputs to the pixels of the others; and the
    queries of a group, an image, and the targets are exchanged, and the other outputs compared. All of that must be
    exactly 0. Where a loss is known, the queries that it matches are counted in both modes. The model is left as it
    was.

    What it does not see: with K = 1 there are no groups to compare, and only images and targets are; of outputs that
    training mode alone has, those with K * N rows are taken to be ordered by groups as the others are; outputs that
    depend on no query are compared between images alone; and a leak that random images and weights do not excite.

    Args:
        model: a module; a ``gd.Detector``, which is checked with the groups that it is trained with; a function that
            builds one of the two, or ``(module, inputs)``, or ``(module, inputs, loss)``, also by its name,
            ``"package.module:function"``; the name of a model of this package, or a checkpoint of one; a directory of
            transformers, or ``transformers:DIR_OR_ID``; a configuration of rfdetr, or its name, such as
            ``"RFDETRNano"``. All of these but modules are built with random weights unless they come with their own.
        inputs: arguments of ``forward`` for at least two images, where images ``[B, 3, H, W]`` alone are not enough:
            one, a tuple of them, or a dictionary by name.
        loss: computes the loss, or a dictionary of losses, from the outputs, in both modes; a module is switched as the
            model is. Without, a ``loss`` among the outputs is used.
        num_groups: K, where both modes have all K groups; else it is found.
        batch_size: images, at least 2.
        image_size: (height, width) of the images; None for a size that fits the model.

    Returns:
        A report; its ``ok`` says whether everything is as it should be, and ``str`` makes it a text.

    Raises:
        ValueError: if there is no such model, it fails on the inputs, its groups are not found, or a number is out of
            range.
        TypeError: if ``model`` is nothing of the above.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, so that one image may see another, got {batch_size}")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if image_size is not None and min(image_size) < 1:
        raise ValueError(f"image_size must be a height and a width from 1 on, got {tuple(image_size)}")
    subject = find_subject(model, inputs, loss, batch_size=batch_size, image_size=image_size)
    try:
        with quiet(subject.model) as modes:
            return _measure(subject, modes, num_groups)
    except RuntimeError as error:  # of a backward pass through foreign code
        raise ValueError(f"gradients of {subject.name} cannot be taken: {in_short(error)}") from error


def _measure(subject: Subject, modes: Modes, num_groups: int | None) -> GroupReport:
    structure = find_structure(subject, modes, num_groups)
    leaks = find_leaks(subject, modes, structure)
    evaluation_loss = None
    if structure.num_groups > 1:
        measured = measure_evaluation_loss(subject, modes, structure)
        if isinstance(measured, str):
            structure.not_checked["loss of evaluation mode"] = measured
        else:
            evaluation_loss = measured
    return GroupReport(
        model=subject.name,
        num_groups=structure.num_groups,
        queries_per_group=structure.group_size,
        evaluation_group=structure.evaluation_group,
        parameters=tuple(each.name for each in structure.parameters),
        outputs=tuple(_reports(structure, leaks)),
        not_checked=structure.not_checked,
        evaluation_loss=evaluation_loss,
        notes=tuple(_notes(modes, structure, leaks)),
        faults=tuple(_faults(leaks, evaluation_loss)),
    )


def _reports(structure: Structure, leaks: Leaks) -> Iterable[OutputReport]:
    for output in structure.outputs:
        groups, images = leaks.groups.get(output.name, Leak()), leaks.images.get(output.name, Leak())
        yield OutputReport(
            name=output.name,
            shape=output.shape,
            group_gradient=groups.gradient,
            group_change=groups.change,
            image_gradient=images.gradient,
            image_change=images.change,
            target_change=leaks.targets.get(output.name, Leak()).change,
            own_gradient=leaks.own_gradient.get(output.name),
        )


def _notes(modes: Modes, structure: Structure, leaks: Leaks) -> Iterable[str]:
    if structure.num_groups == 1:
        yield (
            "no output has a multiple of the queries of evaluation mode in training mode: with one group, images are "
            "compared, and outputs for other targets"
        )
    if structure.interleaved:
        yield f"groups are interleaved: row r belongs to group r modulo {structure.num_groups}"
    if only_training := [output.name for output in structure.query_outputs if not output.in_evaluation]:
        yield (
            f"training mode alone has {_listed(only_training)}, whose rows are taken to be ordered by groups as the "
            "others are"
        )
    if leaks.silent:
        yield f"the outputs of group {_listed(leaks.silent)} have no gradient to queries of their own"
    if modes.dropouts:
        yield f"dropout was off in {_counted(modes.dropouts, 'module')}"
    if leaks.batch_statistics is not None:
        yield (
            f"{_counted(len(modes.batch_norms), 'batch norm')} frozen; where they train, their statistics couple the "
            f"images of a batch, here by a gradient of {leaks.batch_statistics[1]:.3g}"
        )
    if modes.redrawn:
        yield f"{_counted(len(modes.redrawn), 'parameter')} of zeros drawn anew during the check"
    if not leaks.repeats:
        yield "two equal passes gave unequal outputs, so that gradients alone were taken"
    if leaks.random:
        yield "outputs of training mode depend on the state of the random generators, which was the same in every pass"


def _faults(leaks: Leaks, loss: EvaluationLoss | None) -> Iterable[str]:
    for kind, found in (("group", leaks.groups), ("image", leaks.images)):
        if leaking := {name: leak for name, leak in found.items() if leak.found}:
            worst = max(leaking.values(), key=lambda leak: (leak.gradient or 0.0, leak.change or 0.0))
            seer, seen = worst.pair or (0, 0)
            pair = f"{kind} {seer} sees {kind} {seen} ({describe_leak(worst)})"
            yield f"{kind}s see each other in {_listed(leaking)}: {pair}"
    if leaking := {name: leak for name, leak in leaks.targets.items() if leak.found}:
        largest = max(leak.change or 0.0 for leak in leaking.values())
        yield f"the targets reach {_listed(leaking)}, as by denoising queries that groups see (change {largest:.3g})"
    apart = not any(leak.found for leak in leaks.groups.values())
    if apart and leaks.batch_statistics is not None and leaks.batch_statistics[0] != 0:
        yield f"groups see each other by the statistics of batch norms (gradient {leaks.batch_statistics[0]:.3g})"
    if loss is not None and not loss.is_of_one_group:
        right = loss.matched_training / loss.num_groups
        text = (
            f"the loss of evaluation mode is not that of one group: it matches {loss.matched_evaluation} queries, and "
            f"one group {right:.10g}"
        )
        yield text if loss.one_group is None else f"{text} (loss {loss.value:.4g}, of one group {loss.one_group:.4g})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: Iterable[object]) -> str:
    every = [str(name) for name in names]
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
