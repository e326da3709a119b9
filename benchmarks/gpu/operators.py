"""Every operator with inputs and its reference: what the stage ``smoke`` compares."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import groupdetr_fast as gd
from groupdetr_fast.ops._dropout import new_seed
from groupdetr_fast.ops.cross_attention.reference import (
    cross_attention_backward_reference,
    cross_attention_reference,
)
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
from groupdetr_fast.testing import assignment_way, deformable_products, deformable_shared_sort, deformable_tiles
from harness import cases

from .loops import constant

__all__ = [
    "ASSIGNMENT_WAYS",
    "COST",
    "HALF",
    "OPS",
    "Operator",
    "assign",
    "attention",
    "cross_attention",
    "deformable",
    "deformable_backward",
    "deformable_forward",
    "float32_products",
    "goes_by_tiles",
    "largest_difference",
    "make_predictions",
    "matching",
    "name_of",
    "per_group",
    "random_classes",
    "sorts_samples",
    "total_costs",
]

OPS = torch.ops.groupdetr_fast
HALF = (torch.float16, torch.bfloat16)  # what tensor cores take without rounding it
# Every way of linear_assignment's kernel, whichever a GPU takes by itself.
ASSIGNMENT_WAYS = {
    "costs in global memory, sums in doubles": {"shared_costs": False, "fixed_point": False},
    "costs in global memory, sums in fixed point": {"shared_costs": False, "fixed_point": True},
    "costs in shared memory, sums in doubles": {"shared_costs": True, "fixed_point": False},
    "costs in shared memory, sums in fixed point": {"shared_costs": True, "fixed_point": True},
}
COST = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0, "alpha": 0.25, "gamma": 2.0}


class Operator(NamedTuple):
    """An operator, its reference, and what both are called with; ``results`` names the tensors that both return."""

    name: str
    case: str
    results: tuple[str, ...]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple
    in_any_order: bool = False  # whether sums are added up in an order that changes from run to run


def attention(case: cases.Attention, device: torch.device, dtype: torch.dtype, dropout_p: float) -> Iterator[Operator]:
    tensors = [tensor.detach().to(dtype) for tensor in case.make(device)]
    seed = new_seed(device) if dropout_p else None
    rest = (case.groups.as_ints(), dropout_p, seed, case.channels**-0.5)
    label = f"{case}, {case.channels} channels" + (f", dropout {dropout_p}" if dropout_p else "")
    references = grouped_attention_reference, grouped_attention_backward_reference
    yield from _forward_and_backward("grouped_attention", label, tensors, rest, *references)


def cross_attention(
    case: cases.CrossAttention, device: torch.device, dtype: torch.dtype, dropout_p: float
) -> Iterator[Operator]:
    tensors = [*(tensor.detach().to(dtype) for tensor in case.make(device)), case.padding(device)]
    rest = (dropout_p, new_seed(device) if dropout_p else None, case.channels**-0.5)
    label = f"{case}, {case.channels} channels" + (f", dropout {dropout_p}" if dropout_p else "")
    references = cross_attention_reference, cross_attention_backward_reference
    yield from _forward_and_backward("cross_attention", label, tensors, rest, *references)


def _forward_and_backward(
    name: str,
    label: str,
    tensors: Sequence[Tensor | None],
    rest: tuple[Any, ...],
    reference: Callable[..., Any],
    backward_reference: Callable[..., Any],
) -> Iterator[Operator]:
    """An attention of these arguments, and its backward pass, which takes the result between them."""
    forward, backward = getattr(OPS, name), getattr(OPS, f"{name}_backward")
    yield Operator(name, label, ("out", "lse"), forward, reference, (*tensors, *rest))
    out, lse = forward(*tensors, *rest)
    arguments = (torch.randn_like(out), *tensors, out, lse, *rest)
    grads = ("grad_query", "grad_key", "grad_value")
    yield Operator(f"{name}_backward", label, grads, backward, backward_reference, arguments)


def deformable(case: cases.Deformable, device: torch.device, dtype: torch.dtype) -> Iterator[Operator]:
    """All ways of forward and backward; locations and weights stay in float32."""
    value, locations, weights = (tensor.detach() for tensor in case.make(device))
    flat = [size for level in case.levels for size in level]
    inputs = (value.to(dtype), flat, locations, weights)
    for products in (False, True) if dtype in HALF else (False,):
        yield Operator(
            "ms_deform_attn",
            f"{case}, products" if products else str(case),
            ("out",),
            functools.partial(deformable_forward, products),
            ms_deform_attn_reference,
            inputs,
        )
    grad = torch.randn_like(OPS.ms_deform_attn(*inputs))
    ways = [("", True, False), (", deterministic", True, False), (", deterministic, shared sort", True, True)]
    if goes_by_tiles(case, dtype):
        ways.append((", without tiles", False, False))
    if sorts_samples(case, shared_sort=True):
        ways.append((", shared sort", True, True))
    for name, tiles, shared_sort in ways:
        deterministic = name.startswith(", deterministic")
        yield Operator(
            "ms_deform_attn_backward",
            f"{case}{name}",
            ("grad_value", "grad_locations", "grad_weights"),
            functools.partial(deformable_backward, tiles, shared_sort),
            ms_deform_attn_backward_reference,
            (grad, *inputs, deterministic),
            in_any_order=not deterministic,
        )


def sorts_samples(case: cases.Deformable, shared_sort: bool = False) -> bool:
    """Whether the backward pass sorts samples (csrc/cuda/ms_deform_attn.cu)."""
    pixels = sum(height * width for height, width in case.levels)
    samples = (case.queries or pixels) * len(case.levels) * case.points
    return samples >= constant("kSamplesOfPixelInSharedMemory" if shared_sort else "kSamplesOfPixel") * pixels


def goes_by_tiles(case: cases.Deformable, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the backward pass goes by tiles: where it sorts, in half types."""
    return dtype in HALF and sorts_samples(case)


def deformable_forward(products: bool, *inputs: Any) -> Tensor:
    """The op of deformable attention, with its kernel on tensor cores where that serves or without."""
    with deformable_products(products):
        out: Tensor = OPS.ms_deform_attn(*inputs)
    return out


def deformable_backward(tiles: bool, shared_sort: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op of deformable attention.

    With its kernel on tensor cores where that serves or without, and where it sorts, in shared memory or not.
    """
    with deformable_tiles(tiles), deformable_shared_sort(shared_sort):
        return OPS.ms_deform_attn_backward(*inputs)


def matching(case: cases.Matching, device: torch.device, dtype: torch.dtype) -> Iterator[Operator]:
    """What the criterion calls, except for the assignment, whose truth is the least total cost."""
    out, targets = make_predictions(case, device, dtype)
    packed = gd.PackedTargets.from_list(targets)
    inputs = (out.logits, out.boxes.float(), packed.labels, packed.boxes, packed.num_targets, *COST.values())
    yield Operator("matching_cost", str(case), ("cost",), OPS.matching_cost, matching_cost_reference, inputs)
    inputs = (out.logits, random_classes(out, case), 0.25, 2.0)
    yield Operator(
        "sigmoid_focal_loss", str(case), ("loss",), OPS.sigmoid_focal_loss, sigmoid_focal_loss_reference, inputs
    )
    grad = torch.rand(out.logits.shape[:2], device=device)
    yield Operator(
        "sigmoid_focal_loss_backward",
        str(case),
        ("grad_logits",),
        OPS.sigmoid_focal_loss_backward,
        sigmoid_focal_loss_backward_reference,
        (grad, *inputs),
    )
    cost = per_group(gd.ops.matching_cost(out.logits, out.boxes, packed, **COST), case)
    sizes = packed.num_targets[:, None].expand(cost.shape[:-2])
    for name, way in {"": {}, **ASSIGNMENT_WAYS}.items():
        yield Operator(
            "linear_assignment",
            f"{case}, {name}" if name else str(case),
            ("total costs",),
            lambda cost, sizes, way=way: total_costs(cost, assign(cost, sizes, way)),
            lambda cost, sizes: total_costs(cost, linear_assignment_reference(cost, sizes)),
            (cost, sizes),
        )


def assign(cost: Tensor, sizes: Tensor, way: dict[str, bool]) -> Tensor:
    """``linear_assignment`` by a way of :data:`ASSIGNMENT_WAYS`, or by that which serves if it is empty."""
    with assignment_way(**way):
        return gd.ops.linear_assignment(cost, sizes)


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
    return classes.where(torch.rand(shape, device=device) < 1 / 15, gd.ops.NO_OBJECT)


def per_group(cost: Tensor, case: cases.Matching) -> Tensor:
    """``[..., K, T, N]``, a view of ``[..., T, K * N]``"""
    return cost.unflatten(-1, (case.num_groups, case.num_queries)).movedim(-2, -3)


def total_costs(cost: Tensor, queries: Tensor) -> Tensor:
    """Cost of each problem's assignment, in which every target has a query; in float64."""
    return cost.double().gather(-1, queries.unsqueeze(-1)).sum((-2, -1)).to(cost.dtype)


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, how precise torch's products of float32 are; whatever changes it there (some peers do) ends with it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of the largest value of each tensor."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
