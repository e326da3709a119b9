"""The Triton kernels, each launched alone by its own launcher, at sizes of the paper and with tiles of one's choice."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import groupdetr_fast as gd
from groupdetr_fast.ops import _triton_launch
from groupdetr_fast.ops.grouped_attention import triton_launch as attention
from groupdetr_fast.ops.matching_cost import triton_kernels as matching
from groupdetr_fast.ops.sigmoid_focal_loss import triton_kernels as focal

__all__ = [
    "ATTENTION",
    "OTHERS",
    "Launch",
    "Problem",
    "Tile",
    "compiled_only",
    "default_tile",
    "launched",
    "tiles",
    "with_tile",
]

Tile = dict[str, int]
Launch = Callable[[], tuple[Tensor, ...]]

ATTENTION = {
    "attention_forward": attention._grouped_attention_fwd_kernel,
    "attention_backward_query": attention._grouped_attention_bwd_query_kernel,
    "attention_backward_key_value": attention._grouped_attention_bwd_key_value_kernel,
}
OTHERS = {"matching_cost": matching, "focal_forward": focal, "focal_backward": focal}
LEAST_WORK = 8  # scores of a thread for which a program is worth its launch
MOST_SCORES = 64  # of a thread, in registers


@dataclass(frozen=True)
class Problem:
    """What a kernel has to do. Attention is in a half type, the others in float32, as the criterion has them."""

    kernel: str
    queries: int = 300  # of a group
    batch: int = 2
    dropout: float = 0.0
    groups: int = 11
    heads: int = 8
    channels: int = 32
    layers: int = 6
    classes: int = 91
    targets: int = 20

    def compiled_as(self) -> "Problem":
        """The smallest problem that runs the same machine code."""
        return replace(self, queries=300, batch=2) if self.kernel in ATTENTION and self.queries > 300 else self

    def fields(self) -> dict[str, Any]:
        """What identifies the problem in a row."""
        named = {"kernel": self.kernel, "size": f"{self.groups} x {self.queries}", "batch": self.batch}
        return named | ({"dropout": self.dropout} if self.kernel in ATTENTION else {})

    def prepare(self, device: torch.device, *, to_run: bool = True) -> Launch:
        """Inputs, and a function that launches the kernel on them and returns what it computed.

        Args:
            to_run: whether to launch what comes before the kernel, too; to compile it, any numbers will do.
        """
        generator = torch.Generator(device).manual_seed(0)
        if self.kernel in ATTENTION:
            return self._prepare_attention(device, generator, to_run)
        return self._prepare_criterion(device, generator)

    def _prepare_attention(self, device: torch.device, generator: torch.Generator, to_run: bool) -> Launch:
        # Triton's interpreter, which stands in for a GPU, has no products of bfloat16.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        groups = gd.QueryGroups(self.groups, self.queries)
        shape = (self.batch, groups.length, self.heads, self.channels)
        query, key, value, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4))
        seed = torch.tensor([1], device=device) if self.dropout else None
        scale = self.channels**-0.5
        out = torch.zeros_like(value)
        lse, delta = (out.new_zeros(self.batch, self.heads, groups.length, dtype=torch.float32) for _ in range(2))
        row_words = lse.new_zeros(*lse.shape, 2, dtype=torch.int32) if self.dropout else None
        strided = grad, query, key, value

        def launch(kernel: str, tensors: tuple[Tensor | None, ...], strided: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            call = attention._call(query, value, groups.as_ints(), self.dropout, scale)
            attention._launch(ATTENTION[kernel], tuple(tensor.stride() for tensor in strided), call)(*tensors)
            return tensors

        def forward() -> tuple[Tensor, ...]:
            results = torch.empty_like(out), torch.empty_like(lse)
            return launch("attention_forward", (*results, query, key, value, seed), strided[1:])[:2]

        def backward_query() -> tuple[Tensor, ...]:
            results = torch.empty_like(query), torch.empty_like(lse)
            words = None if row_words is None else torch.empty_like(row_words)
            launch("attention_backward_query", (*results, words, *strided, out, lse, seed), strided)
            return results if words is None else (*results, words)

        def backward_key_value() -> tuple[Tensor, ...]:
            results = torch.empty_like(key), torch.empty_like(value)
            tensors = (*results, *strided, lse, delta, row_words, seed)
            return launch("attention_backward_key_value", tensors, strided)[:2]

        if self.kernel == "attention_forward":
            return forward
        if to_run:
            out, lse = forward()
        if self.kernel == "attention_backward_query":
            return backward_query
        if to_run:
            _, delta, *words = backward_query()
            row_words = words[0] if words else None
        return backward_key_value

    def _prepare_criterion(self, device: torch.device, generator: torch.Generator) -> Launch:
        options = {"generator": generator, "device": device}
        leading = (self.layers, self.batch, self.groups * self.queries)
        logits = torch.randn(*leading, self.classes, **options) - 3
        boxes = torch.rand(*leading, 4, **options) * 0.4 + 0.2
        labels = torch.randint(self.classes, (self.batch, self.targets), **options)
        target_boxes = torch.rand(self.batch, self.targets, 4, **options) * 0.4 + 0.2
        num_targets = torch.full((self.batch,), self.targets, device=device)
        # As after an assignment: one query in so many has an object.
        classes = torch.randint(self.classes, leading, **options)
        has_object = torch.rand(leading, **options) < self.targets / self.queries
        target_classes = torch.where(has_object, classes, -1)
        grad = torch.rand(leading[:2], **options) + 0.5
        if self.kernel == "matching_cost":
            arguments = (logits, boxes, labels, target_boxes, num_targets, 2.0, 5.0, 2.0, 0.25, 2.0)
            return lambda: (matching.forward(*arguments),)
        if self.kernel == "focal_forward":
            return lambda: (focal.forward(logits, target_classes, 0.25, 2.0),)
        return lambda: (focal.backward(grad, logits, target_classes, 0.25, 2.0),)


def default_tile(problem: Problem) -> Tile:
    """The tile that the launcher chooses."""
    if problem.kernel in ATTENTION:
        dims = problem.channels, problem.channels
        tile = attention._tile(ATTENTION[problem.kernel], "half", *dims, problem.queries)
        return {"block": tile.block, "step": tile.step, "warps": tile.num_warps, "stages": tile.num_stages}
    launch = OTHERS[problem.kernel]._LAUNCH
    if problem.kernel == "matching_cost":
        blocks = {"block_t": matching._block_t(problem.targets, 4), "block_q": matching._BLOCK_Q}
    else:
        chosen = focal._blocks(problem.classes)
        blocks = {"block_q": chosen["BLOCK_Q"], "block_c": chosen["BLOCK_C"]}
    return {**blocks, "warps": launch["num_warps"], "stages": launch["num_stages"]}


def tiles(problem: Problem) -> list[Tile]:
    """Tiles to try; those that are like the launcher's own come first."""
    if problem.kernel in ATTENTION:
        found = [
            {"block": block, "step": step, "warps": warps, "stages": stages}
            for block, step, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
            if LEAST_WORK <= block * step / (32 * warps) <= MOST_SCORES
        ]
    elif problem.kernel == "matching_cost":
        found = [
            {"block_t": block_t, "block_q": block_q, "warps": warps, "stages": 1}
            for block_t, block_q, warps in product((8, 16, 32), (32, 64, 128), (2, 4, 8))
        ]
    else:
        found = [
            {"block_q": logits // 32, "block_c": 32, "warps": warps, "stages": 1}
            for logits, warps in product((256, 512, 1024, 2048, 4096), (2, 4, 8))
        ]
    default = default_tile(problem)
    return sorted(found, key=lambda tile: sum(abs(math.log2(tile[key] / default[key])) for key in default))


@contextmanager
def with_tile(problem: Problem, tile: Tile) -> Iterator[None]:
    """Inside, the launcher of the problem's kernel uses this tile."""
    module = attention if problem.kernel in ATTENTION else OTHERS[problem.kernel]
    if problem.kernel in ATTENTION:
        chosen = attention.Tile(tile["block"], tile["step"], tile["warps"], tile["stages"])
        changes = {"_tile": lambda *_: chosen}
    else:
        changes = {"_LAUNCH": {"num_warps": tile["warps"], "num_stages": tile["stages"]}}
        if problem.kernel == "matching_cost":
            changes |= {"_BLOCK_Q": tile["block_q"], "_block_t": lambda *_: tile["block_t"]}
        else:
            changes |= {"_blocks": lambda _: {"BLOCK_Q": tile["block_q"], "BLOCK_C": tile["block_c"]}}
    _forget_launches()
    try:
        with mock.patch.multiple(module, **changes):
            yield
    finally:
        _forget_launches()


def _forget_launches() -> None:
    attention_launches = attention._forward_launch, attention._backward_launches
    for function in (*attention_launches, matching._launch, focal._forward_launch, focal._backward_launch):
        function.cache_clear()


@contextmanager
def compiled_only() -> Iterator[None]:
    """Inside, Triton compiles kernels into its cache on disk and launches none."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_(kernel, *args, warmup, **options):
        return run(kernel, *args, warmup=True, **options)

    with mock.patch.object(JITFunction, "run", compile_), mock.patch.object(_triton_launch, "DIRECT", False):
        yield


@contextmanager
def launched() -> Iterator[list[Any]]:
    """Inside, the list gets what Triton compiled for each launch; it stays empty under the interpreter."""
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, []

    def launch(kernel, *args, **options):
        found.append(run(kernel, *args, **options))
        return found[-1]

    with mock.patch.object(JITFunction, "run", launch), mock.patch.object(_triton_launch, "DIRECT", False):
        yield found
