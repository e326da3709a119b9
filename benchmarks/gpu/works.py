"""Ways to do the same work on a GPU: this package and its peers.

A naive peer does what the papers' repositories do, with torch's own operators.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import groupdetr_fast as gd
from cpu.bench_criterion import Ours, RfDetr, Transformers
from cpu.bench_ms_deform_attn import with_grid_sample
from cpu.bench_ms_deform_attn import with_op as deform_with_op
from groupdetr_fast import ops
from harness import cases
from harness.naive import cross_image_cost, explicit_mask_attention, folded_sdpa, masked_sdpa, padded_sdpa
from harness.results import OURS

from .operators import (
    ASSIGNMENT_WAYS,
    COST,
    HALF,
    assign,
    deformable_backward,
    deformable_forward,
    goes_by_tiles,
    make_predictions,
    name_of,
    per_group,
    random_classes,
    sorts_samples,
    total_costs,
)

__all__ = [
    "Contender",
    "Work",
    "assignment",
    "attention",
    "class_loss",
    "compiled",
    "criterion",
    "cross_attention",
    "deformable",
    "matching_cost",
]


class Contender(NamedTuple):
    """``make()`` returns a function of the work's inputs; an ImportError there means that a package is missing.

    ``in_graph`` tells whether a CUDA graph can hold it: it must not wait for the device.
    """

    make: Callable[[], Callable[..., Any]]
    in_graph: bool = True


class Work(NamedTuple):
    """Several ways to do the same work.

    Attributes:
        name: what is done.
        fields: its sizes and settings, for the rows.
        inputs: of all contenders; a backward pass is timed too if some require a gradient.
        contenders: by name; the first is :data:`~harness.results.OURS`, this package.
        result: from what a contender returns to the tensor whose sum is derived.
        outcome: from what a contender returns to the tensors that all must agree on; None if they are random.
        peer_gradients: whether the gradients of peers must agree too; those of this package's other ways must.
    """

    name: str
    fields: dict[str, Any]
    inputs: tuple
    contenders: dict[str, Contender]
    result: Callable[[Any], Tensor]
    outcome: Callable[[Any], list[Tensor]] | None
    peer_gradients: bool = True


def attention(case: cases.Attention, device: torch.device, dtype: torch.dtype, dropout_p: float = 0.0) -> Work:
    """Decoder self-attention. With denoising queries groups cannot be folded."""
    groups = case.groups
    inputs = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in case.make(device))
    contenders = {OURS: functools.partial(ops.grouped_attention, groups=groups, dropout_p=dropout_p)}
    if groups.denoising_length == 0:
        contenders["folded SDPA"] = functools.partial(folded_sdpa, groups=groups, dropout_p=dropout_p)
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            name = f"folded SDPA, {backend.partition('_')[0].lower()}"
            contenders[name] = functools.partial(with_backend, backend, groups=groups, dropout_p=dropout_p)
        if dropout_p == 0:
            contenders["varlen_attn"] = functools.partial(with_varlen, groups=groups)
    contenders["masked SDPA"] = functools.partial(masked_sdpa, groups=groups, dropout_p=dropout_p)
    if groups.length * case.batch <= 10_000:  # its scores would not fit the memory
        contenders["explicit mask"] = functools.partial(explicit_mask_attention, groups=groups, dropout_p=dropout_p)
    return Work(
        "grouped_attention",
        {"case": str(case), "batch": case.batch, "dtype": name_of(dtype), "dropout": dropout_p},
        inputs,
        {name: ready(run) for name, run in contenders.items()},
        result=lambda out: out,
        outcome=None if dropout_p else lambda out: [out],
    )


def compiled(case: cases.Attention, device: torch.device, dtype: torch.dtype) -> Work:
    """The same with FlexAttention, which takes long to compile: a work of its own, in which ours is timed again.

    Without denoising queries, as FlexAttention's block mask is made by arithmetic on the rows.
    """
    work = attention(case, device, dtype)

    def make() -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        size, length = case.groups.queries_per_group, case.groups.length
        mask = create_block_mask(lambda b, h, row, key: row // size == key // size, None, None, length, length, device)
        attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
        return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    contenders = {OURS: work.contenders[OURS], "FlexAttention": Contender(make)}
    return work._replace(contenders=contenders)


def with_backend(backend: str, *qkv: Tensor, groups: gd.QueryGroups, dropout_p: float) -> Tensor:
    with sdpa_kernel(SDPBackend.__members__[backend]):
        return folded_sdpa(*qkv, groups=groups, dropout_p=dropout_p)


def with_varlen(query: Tensor, key: Tensor, value: Tensor, *, groups: gd.QueryGroups) -> Tensor:
    """Every group of every image is a sequence of its own."""
    from torch.nn.attention.varlen import varlen_attn

    size = groups.queries_per_group
    starts = sequence_starts(len(query) * groups.num_groups, size, query.device)
    rows = (tensor.flatten(0, 1) for tensor in (query, key, value))
    return varlen_attn(*rows, starts, starts, size, size).view(value.shape)


def cross_attention(
    case: cases.CrossAttention, device: torch.device, dtype: torch.dtype, dropout_p: float = 0.0
) -> Work:
    """Of a decoder's queries to images. Without padding torch's fastest kernel serves, if heads have one size."""
    inputs = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in case.make(device))
    arguments = {"padding": case.padding(device), "dropout_p": dropout_p}
    contenders = {
        OURS: functools.partial(ops.cross_attention, **arguments),
        "SDPA": functools.partial(padded_sdpa, **arguments),
    }
    for backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        forced = functools.partial(with_backend_padded, backend, **arguments)
        contenders[f"SDPA, {backend.partition('_')[0].lower()}"] = forced
    if case.mask == "none":
        wide = functools.partial(with_backend_padded, "FLASH_ATTENTION", widen_values=True, **arguments)
        contenders["SDPA, flash, widened values"] = wide
    return Work(
        "cross_attention",
        {"case": str(case), "batch": case.batch, "dtype": name_of(dtype), "dropout": dropout_p},
        inputs,
        {name: ready(run) for name, run in contenders.items()},
        result=lambda out: out,
        outcome=None if dropout_p else lambda out: [out],
    )


def with_backend_padded(backend: str, *qkv: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.__members__[backend]):
        return padded_sdpa(*qkv, **options)


@functools.cache
def sequence_starts(sequences: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(sequences + 1, dtype=torch.int32, device=device) * size


def deformable(case: cases.Deformable, device: torch.device, dtype: torch.dtype) -> Work:
    """Locations and weights stay in float32 where a peer allows it.

    The gradient of a location jumps between two pixels, where peers round to the other side.
    """
    value, *samples = (tensor.detach() for tensor in case.make(device))
    inputs = tuple(tensor.requires_grad_() for tensor in (value.to(dtype), *samples))
    levels = list(case.levels)
    shapes = torch.tensor(levels, device=device)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)

    def torch_ms_deform_attn() -> Callable[..., Tensor]:
        from torch_ms_deform_attn import ms_deform_attn

        def attend(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
            """Half values under autocast, which computes in float32: it would else want locations in half precision."""
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=value.dtype != torch.float32):
                return ms_deform_attn(value, shapes, starts, places, weights).to(value.dtype)

        return attend

    def deformops(backend: str) -> Callable[..., Tensor]:
        from deformops.registry import Backend, msda

        def attend(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
            return msda(value, shapes, starts, places, weights.to(value.dtype), backend=Backend(backend))

        return attend

    flat = [size for level in levels for size in level]
    contenders = {OURS: ready(lambda value, *samples: deform_with_op(value, levels, *samples))}
    ways = {
        "products": (dtype in HALF, {"products": True}),
        "shared sort": (sorts_samples(case, shared_sort=True), {"shared_sort": True}),
        "without tiles": (goes_by_tiles(case, dtype), {"tiles": False}),
    }
    for name, (differs, way) in ways.items():
        if differs:
            contenders[f"{OURS}, {name}"] = ready(
                lambda value, *samples, way=way: DeformableWay.apply(way, value, flat, *samples)
            )
    contenders |= {
        "torch-ms-deform-attn": Contender(torch_ms_deform_attn),
        "deformops, Triton": Contender(lambda: deformops("triton")),
        "deformops, CUDA": Contender(lambda: deformops("cuda")),
        "grid_sample": ready(lambda value, *samples: with_grid_sample(value, levels, *samples)),
    }
    fields = {"case": str(case), "batch": case.batch, "dtype": name_of(dtype)}
    return Work("ms_deform_attn", fields, inputs, contenders, as_is, lambda out: [out], peer_gradients=False)


class DeformableWay(torch.autograd.Function):
    """Deformable attention, whose way differs from that which serves in what is named.

    Its forward pass goes by ``products`` or not, its backward pass by ``tiles`` or not and by a ``shared_sort`` or not.
    """

    @staticmethod
    def forward(
        ctx: Any, way: dict[str, bool], value: Tensor, flat: list[int], places: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.way, ctx.flat = way, flat
        ctx.save_for_backward(value, places, weights)
        return deformable_forward(way.get("products", False), value, flat, places, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, places, weights = ctx.saved_tensors
        tiles, shared_sort = ctx.way.get("tiles", True), ctx.way.get("shared_sort", False)
        grad_value, *grads = deformable_backward(tiles, shared_sort, grad, value, ctx.flat, places, weights)
        return None, grad_value, None, *grads


def matching_cost(case: cases.Matching, device: torch.device, dtype: torch.dtype) -> Work:
    out, targets = make_predictions(case, device, dtype)
    packed = gd.PackedTargets.from_list(targets)
    labels, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))

    def all_pairs(logits: Tensor, predicted: Tensor) -> list[Tensor]:
        """Layer by layer, as in DETR's repository."""
        layers = zip(logits.float(), predicted.float(), strict=True)
        return [cross_image_cost(*layer, labels, boxes) for layer in layers]

    def same_image(result: Tensor | list[Tensor]) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result]
        pairs = torch.stack(result).view(case.layers, case.batch, -1, case.batch, case.targets)  # [layers, B, Q, B, T]
        return [pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 2, 1)]

    contenders = {
        OURS: ready(lambda logits, predicted: ops.matching_cost(logits, predicted, packed, **COST)),
        "all pairs": ready(all_pairs),
    }
    fields = {"case": str(case), "batch": case.batch, "dtype": name_of(dtype)}
    return Work("matching_cost", fields, (out.logits, out.boxes), contenders, as_is, same_image)


def assignment(case: cases.Matching, device: torch.device) -> Work:
    out, targets = make_predictions(case, device, torch.float32)
    packed = gd.PackedTargets.from_list(targets)
    cost = ops.matching_cost(out.logits, out.boxes, packed, **COST)
    sizes = packed.num_targets[:, None]

    def scipy() -> Callable[[Tensor], Tensor]:
        from scipy.optimize import linear_sum_assignment

        def solve(cost: Tensor) -> Tensor:
            """On the host, problem by problem, and back to the device."""
            problems = per_group(cost, case).cpu()
            solved = [torch.from_numpy(linear_sum_assignment(one)[1]) for one in problems.flatten(0, -3).numpy()]
            return torch.stack(solved).view(problems.shape[:-1]).to(device)

        return solve

    def by_problem(solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A solver of ``[problems, T, N]``; that its input is copied is part of its price."""

        def assign(cost: Tensor) -> Tensor:
            problems = per_group(cost, case)
            return solve(problems.flatten(0, -3)).view(problems.shape[:-1])

        return assign

    def torch_linear_assignment() -> Callable[[Tensor], Tensor]:
        from torch_linear_assignment import batch_linear_assignment

        return by_problem(batch_linear_assignment)

    def without_checks() -> Callable[[Tensor], Tensor]:
        from torch_linear_assignment._triton import batch_linear_assignment

        return by_problem(functools.partial(batch_linear_assignment, validation="off"))

    contenders = {
        OURS: ready(lambda cost: ops.linear_assignment(per_group(cost, case), sizes)),
        **{
            f"{OURS}, {name}": ready(lambda cost, way=way: assign(per_group(cost, case), sizes, way))
            for name, way in ASSIGNMENT_WAYS.items()
        },
        "torch-linear-assignment": Contender(torch_linear_assignment, in_graph=False),
        "torch-linear-assignment, no checks": Contender(without_checks),
        "scipy": Contender(scipy, in_graph=False),
    }
    fields = {"case": str(case), "batch": case.batch, "dtype": "float32"}
    return Work(
        "linear_assignment",
        fields,
        (cost,),
        contenders,
        as_is,
        lambda queries: [total_costs(per_group(cost, case), queries)],
    )


def class_loss(case: cases.Matching, device: torch.device, dtype: torch.dtype) -> Work:
    out, _ = make_predictions(case, device, dtype)
    classes = random_classes(out, case)

    def torchvision() -> Callable[[Tensor], Tensor]:
        from torchvision.ops import sigmoid_focal_loss

        def loss(logits: Tensor) -> Tensor:
            expected = F.one_hot(classes.where(classes >= 0, case.classes), case.classes + 1)[..., :-1]
            return sigmoid_focal_loss(logits.float(), expected.float()).sum((-2, -1))

        return loss

    contenders = {
        OURS: ready(lambda logits: ops.sigmoid_focal_loss(logits, classes)),
        "torchvision, one-hot": Contender(torchvision),
    }
    fields = {"case": str(case), "batch": case.batch, "dtype": name_of(dtype)}
    return Work("sigmoid_focal_loss", fields, (out.logits.requires_grad_(),), contenders, as_is, lambda loss: [loss])


def criterion(case: cases.Matching, device: torch.device) -> Work:
    """Matching and the whole loss. The class loss of the peers is another one, of similar work."""
    out, targets = make_predictions(case, device, torch.float32)

    def of(make: Callable[[cases.Matching], Any]) -> Callable[..., dict[str, Tensor]]:
        contender = make(case)
        return lambda logits, boxes: contender.loss(gd.DetectorOutput(logits, boxes, out.groups), targets)

    def box_losses(losses: dict[str, Tensor]) -> list[Tensor]:
        names = sorted(name for name in losses if name.startswith(("loss_bbox", "loss_giou")))
        return [torch.stack([losses[name].detach() for name in names])]

    contenders = {
        OURS: Contender(lambda: of(Ours), in_graph=False),  # it packs the targets, which come from the host
        "transformers": Contender(lambda: of(Transformers), in_graph=False),
        "rfdetr": Contender(lambda: of(RfDetr), in_graph=False),
    }
    inputs = (out.logits.requires_grad_(), out.boxes.requires_grad_())
    fields = {"case": str(case), "batch": case.batch, "dtype": "float32"}
    return Work(
        "criterion", fields, inputs, contenders, lambda losses: losses["loss"], box_losses, peer_gradients=False
    )


def ready(run: Callable[..., Any]) -> Contender:
    """A contender that needs no preparation."""
    return Contender(lambda: run)


def as_is(result: Any) -> Any:
    return result
