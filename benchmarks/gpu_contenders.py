"""What gpu_report.py compares: the kernels with their references, and ways to do the same work.

A naive peer does what the papers' repositories do, with torch's own operators.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cases
import torch
from bench_criterion import Transformers
from bench_ms_deform_attn import with_grid_sample
from bench_ms_deform_attn import with_op as deform_with_op
from naive import cross_image_cost, explicit_mask_attention, folded_sdpa, masked_sdpa
from results import OURS
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

import groupdetr_fast as gd
from groupdetr_fast import ops
from groupdetr_fast.ops.grouped_attention.reference import (
    grouped_attention_backward_reference,
    grouped_attention_reference,
)
from groupdetr_fast.ops.linear_assignment.reference import linear_assignment_reference
from groupdetr_fast.ops.matching_cost.reference import matching_cost_reference
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference
from groupdetr_fast.ops.sigmoid_focal_loss.reference import (
    sigmoid_focal_loss_backward_reference,
    sigmoid_focal_loss_reference,
)

__all__ = ["Kernel", "Work", "attention_work", "criterion_work", "kernels", "works"]

MODEL = "conditional_detr_r50"
NO_OBJECT = -1
COST = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0, "alpha": 0.25, "gamma": 2.0}


class Kernel(NamedTuple):
    """An operator, its reference, and what both are called with. Both return a tensor or several."""

    name: str
    case: object
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple


class Work(NamedTuple):
    """Several ways to do the same work.

    Attributes:
        name: what is done.
        case: its sizes, from cases.py.
        runs: functions without arguments, by the contender's name; the first is :data:`~results.OURS`, this package.
        outcome: the tensors of a result that all contenders must agree on.
    """

    name: str
    case: object
    runs: dict[str, Callable[[], Any]]
    outcome: Callable[[Any], list[Tensor]]


def kernels(
    attention: cases.Attention,
    deformable: cases.Deformable,
    matching: cases.Matching,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Kernel]:
    """Every operator that may have a kernel of its own, at one size each."""
    library = torch.ops.groupdetr_fast
    tensors = [tensor.detach().to(device, dtype) for tensor in attention.make()]
    layout = gd.QueryGroups(attention.num_groups, attention.num_queries).as_ints()
    rest = (layout, 0.0, None, attention.channels**-0.5)
    yield Kernel(
        "grouped_attention", attention, library.grouped_attention, grouped_attention_reference, (*tensors, *rest)
    )
    forward = library.grouped_attention(*tensors, *rest)
    yield Kernel(
        "grouped_attention_backward",
        attention,
        library.grouped_attention_backward,
        grouped_attention_backward_reference,
        (torch.randn_like(forward[0]), *tensors, *forward, *rest),
    )

    value, locations, weights = (tensor.detach().to(device) for tensor in deformable.make())
    flat = [size for level in deformable.levels for size in level]
    inputs = (value.to(dtype), flat, locations, weights)
    yield Kernel("ms_deform_attn", deformable, library.ms_deform_attn, ms_deform_attn_reference, inputs)
    grad = torch.randn_like(library.ms_deform_attn(*inputs))
    yield Kernel(
        "ms_deform_attn_backward",
        deformable,
        library.ms_deform_attn_backward,
        ms_deform_attn_backward_reference,
        (grad, *inputs),
    )

    out, targets = make_predictions(matching, device, dtype)
    packed = gd.PackedTargets.from_list(targets)
    inputs = (out.logits, out.boxes.float(), packed.labels, packed.boxes, packed.num_targets, *COST.values())
    yield Kernel("matching_cost", matching, library.matching_cost, matching_cost_reference, inputs)
    classes = random_classes(out, matching)
    yield Kernel(
        "sigmoid_focal_loss",
        matching,
        library.sigmoid_focal_loss,
        sigmoid_focal_loss_reference,
        (out.logits, classes, 0.25, 2.0),
    )
    grad = torch.rand(out.logits.shape[:2], device=device)
    yield Kernel(
        "sigmoid_focal_loss_backward",
        matching,
        library.sigmoid_focal_loss_backward,
        sigmoid_focal_loss_backward_reference,
        (grad, out.logits, classes, 0.25, 2.0),
    )
    cost = per_group(ops.matching_cost(out.logits, out.boxes, packed, **COST), matching)
    sizes = packed.num_targets[:, None].expand(cost.shape[:-2])
    yield Kernel(
        "linear_assignment",
        matching,
        lambda cost, sizes: total_costs(cost, library.linear_assignment(cost.float(), sizes)),
        lambda cost, sizes: total_costs(cost, linear_assignment_reference(cost.float(), sizes)),
        (cost, sizes),
    )


def works(
    attention: cases.Attention,
    deformable: cases.Deformable,
    matching: cases.Matching,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Work]:
    """What is timed, at one size each: every op, and the whole criterion."""
    yield attention_work(attention, device, dtype)
    yield deformable_work(deformable, device, dtype)
    yield cost_work(matching, device, dtype)
    if dtype == torch.float32:  # costs are float32 whatever the predictions are
        yield assignment_work(matching, device)
    yield class_loss_work(matching, device, dtype)
    yield criterion_work(matching, device, dtype)


def attention_work(case: cases.Attention, device: torch.device, dtype: torch.dtype) -> Work:
    """Forward and backward."""
    inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in case.make()]
    groups = gd.QueryGroups(case.num_groups, case.num_queries)
    grad = torch.randn_like(inputs[0])

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        out = attend(*inputs, groups)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    contenders = {
        OURS: ops.grouped_attention,
        "folded SDPA": folded_sdpa,
        "masked SDPA": masked_sdpa,
        "explicit mask": explicit_mask_attention,
    }
    runs = {name: functools.partial(run, attend) for name, attend in contenders.items()}
    return Work("grouped_attention", case, runs, list)


def deformable_work(case: cases.Deformable, device: torch.device, dtype: torch.dtype) -> Work:
    """Forward and backward; locations and weights stay in float32."""
    value, *samples = (tensor.detach().to(device) for tensor in case.make())
    inputs = [tensor.requires_grad_() for tensor in (value.to(dtype), *samples)]
    levels = list(case.levels)
    grad = torch.randn_like(deform_with_op(inputs[0], levels, *inputs[1:]))

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        out = attend(inputs[0], levels, *inputs[1:])
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    contenders = {OURS: deform_with_op, "grid_sample": with_grid_sample}
    runs = {name: functools.partial(run, attend) for name, attend in contenders.items()}
    return Work("ms_deform_attn", case, runs, list)


def make_predictions(
    case: cases.Matching, device: torch.device, dtype: torch.dtype
) -> tuple[gd.DetectorOutput, list[dict[str, Tensor]]]:
    out, targets = case.make()
    out = gd.DetectorOutput(out.logits.to(device, dtype), out.boxes.to(device, dtype), out.groups)
    return out, [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]


def random_classes(out: gd.DetectorOutput, case: cases.Matching) -> Tensor:
    """A target class for one query of 15, about as many as are matched."""
    shape, device = out.logits.shape[:-1], out.logits.device
    classes = torch.randint(case.classes, shape, device=device)
    return classes.where(torch.rand(shape, device=device) < 1 / 15, NO_OBJECT)


def cost_work(case: cases.Matching, device: torch.device, dtype: torch.dtype) -> Work:
    out, targets = make_predictions(case, device, dtype)
    packed = gd.PackedTargets.from_list(targets)

    def with_all_pairs() -> list[Tensor]:
        """Layer by layer, as in DETR's repository."""
        labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        layers = zip(out.logits.float(), out.boxes.float(), strict=True)
        return [cross_image_cost(*layer, labels, boxes) for layer in layers]

    def same_image(result: Tensor | list[Tensor]) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result]
        pairs = torch.stack(result).view(case.layers, case.batch, -1, case.batch, case.targets)  # [layers, B, Q, B, T]
        return [pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 2, 1)]

    runs = {OURS: lambda: ops.matching_cost(out.logits, out.boxes, packed, **COST), "all pairs": with_all_pairs}
    return Work("matching_cost", case, runs, same_image)


def assignment_work(case: cases.Matching, device: torch.device) -> Work:
    out, targets = make_predictions(case, device, torch.float32)
    packed = gd.PackedTargets.from_list(targets)
    cost = per_group(ops.matching_cost(out.logits, out.boxes, packed, **COST), case)

    def with_scipy() -> Tensor:
        """On the host, problem by problem, and back to the device."""
        problems = cost.cpu().flatten(0, -3).numpy()
        queries = [torch.from_numpy(linear_sum_assignment(problem)[1]) for problem in problems]
        return torch.stack(queries).view(cost.shape[:-1]).to(device)

    runs = {OURS: lambda: ops.linear_assignment(cost, packed.num_targets[:, None]), "scipy": with_scipy}
    return Work("linear_assignment", case, runs, lambda queries: [total_costs(cost, queries)])


def per_group(cost: Tensor, case: cases.Matching) -> Tensor:
    """``[..., K, T, N]``, a view of ``[..., T, K * N]``"""
    return cost.unflatten(-1, (case.num_groups, case.num_queries)).movedim(-2, -3)


def total_costs(cost: Tensor, queries: Tensor) -> Tensor:
    """Cost of each problem's assignment, in which every target has a query."""
    return cost.gather(-1, queries.unsqueeze(-1)).sum((-2, -1))


def class_loss_work(case: cases.Matching, device: torch.device, dtype: torch.dtype) -> Work:
    """Forward and backward of the class loss of all layers."""
    out, _ = make_predictions(case, device, dtype)
    classes = random_classes(out, case)
    logits = out.logits.requires_grad_()

    def with_one_hot(logits: Tensor, classes: Tensor) -> Tensor:
        expected = F.one_hot(classes.where(classes >= 0, case.classes), case.classes + 1)[..., :-1]
        return torchvision_focal_loss(logits.float(), expected.float()).sum((-2, -1))

    def run(loss: Callable[..., Tensor]) -> list[Tensor]:
        values = loss(logits, classes)
        return [values.detach(), *torch.autograd.grad(values.sum(), logits)]

    contenders = {OURS: ops.sigmoid_focal_loss, "torchvision, one-hot": with_one_hot}
    runs = {name: functools.partial(run, loss) for name, loss in contenders.items()}
    return Work("sigmoid_focal_loss", case, runs, list)


def criterion_work(case: cases.Matching, device: torch.device, dtype: torch.dtype) -> Work:
    """Matching and the whole loss, forward and backward. The class loss of transformers' LW-DETR is another one."""
    out, targets = make_predictions(case, device, dtype)
    packed = gd.PackedTargets.from_list(targets)
    criterion = gd.build_criterion(MODEL)
    out.logits.requires_grad_()
    out.boxes.requires_grad_()

    def run(loss: Callable[[], dict[str, Tensor]]) -> tuple:
        losses = loss()
        return losses, torch.autograd.grad(losses["loss"], (out.logits, out.boxes))

    def box_losses(result: tuple) -> list[Tensor]:
        losses, _ = result
        names = sorted(name for name in losses if name.startswith(("loss_bbox", "loss_giou")))
        return [torch.stack([losses[name].detach() for name in names])]

    theirs = functools.cache(lambda: Transformers(case))
    runs = {
        OURS: functools.partial(run, lambda: criterion(out, packed)),
        "transformers": functools.partial(run, lambda: theirs().loss(out, targets)),
    }
    return Work("criterion", case, runs, box_losses)
