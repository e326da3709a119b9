"""Runs every op of the package once: what NVIDIA's tools watch.

python -m gpu.every_op small [--device cpu]     all ops, small, with denoising and dropout: for the sanitizer
python -m gpu.every_op large                    the most expensive kernels at the paper's sizes: for the profiler
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import groupdetr_fast as gd
from groupdetr_fast.testing import deformable_products, deformable_shared_sort, deformable_tiles, ms_deform_attn_inputs
from harness import cases

from .operators import ASSIGNMENT_WAYS, assign


def small(device: torch.device) -> None:
    """Forward and backward of every op in a half type and in float32.

    Raises:
        AssertionError: if a result is not finite.
    """
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        _attention(gd.QueryGroups(2, 70, 2, 9), 32, 0.0, dtype, device)
        _attention(gd.QueryGroups(2, 35, 1, 20, denoising_scope="every"), 24, 0.2, dtype, device)
        _attention(gd.QueryGroups(3, 6), 16, 0.2, dtype, device)
        _cross_attention(cases.CrossAttention(70, heads=2, map=(5, 9)), 0.2, dtype, device)
        _cross_attention(cases.CrossAttention(40, mask="none", heads=2, map=(4, 9)), 0.0, dtype, device)
        _deformable({"heads": 2, "dim": 32, "points": 4}, 1.0, dtype, device)
        _deformable({"heads": 3, "dim": 40, "points": 7}, 2.0**101, dtype, device)
        # several chunks and windows of bins, where samples are sorted in shared memory
        many = {"batch": 1, "heads": 1, "queries": 4000, "shapes": ((110, 120), (3, 2)), "points": 4}
        _deformable(many, 1.0, dtype, device)
        _criterion(dtype, device)


def _attention(groups: gd.QueryGroups, dim: int, dropout: float, dtype: torch.dtype, device: torch.device) -> None:
    shape = (2, groups.length, 2, dim)
    inputs = [torch.randn(shape).to(dtype).to(device).requires_grad_() for _ in range(3)]
    _check(gd.ops.grouped_attention(*inputs, groups, dropout_p=dropout), inputs)


def _cross_attention(case: cases.CrossAttention, dropout: float, dtype: torch.dtype, device: torch.device) -> None:
    inputs = [tensor.detach().to(dtype).to(device).requires_grad_() for tensor in case.make()]
    padding = case.padding()
    _check(gd.ops.cross_attention(*inputs, None if padding is None else padding.to(device), dropout_p=dropout), inputs)


def _deformable(sizes: dict[str, Any], largest: float, dtype: torch.dtype, device: torch.device) -> None:
    """Every way of it; a weight may be too large for what tensor cores take."""
    value, flat, places, weights = ms_deform_attn_inputs(**{"queries": 37, **sizes}, dtype=dtype)
    weights[0, 3, 0, 0, 0] *= largest
    shapes = list(zip(flat[::2], flat[1::2], strict=True))
    for deterministic, newer in ((False, False), (True, False), (False, True), (True, True)):
        inputs = [tensor.clone().to(device).requires_grad_() for tensor in (value, places, weights)]
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            with deformable_products(newer), deformable_tiles(newer), deformable_shared_sort(newer):
                _check(gd.ops.ms_deform_attn(inputs[0], shapes, *inputs[1:]), inputs)
        finally:
            torch.use_deterministic_algorithms(False)


def _criterion(dtype: torch.dtype, device: torch.device) -> None:
    out, targets = cases.Matching(17, layers=2, num_groups=2, num_queries=70, classes=33).make()
    logits, boxes = out.logits.to(dtype).to(device), out.boxes.to(device)
    packed = gd.PackedTargets.from_list(targets).to(device)
    cost = gd.ops.matching_cost(logits, boxes, packed)
    problems = cost.unflatten(-1, (2, 70)).transpose(-2, -3)
    for way in ({}, *ASSIGNMENT_WAYS.values()):
        assert (assign(problems, packed.num_targets[:, None], way).cpu() >= 0).all()
    classes = torch.randint(-1, 33, logits.shape[:-1]).to(device)
    _check(gd.ops.sigmoid_focal_loss(logits.requires_grad_(), classes), [logits])


def _check(result: Tensor, inputs: Sequence[Tensor]) -> None:
    """Backward, and a look at the numbers on the CPU: the sanitizer takes long over every kernel of torch."""
    grad = torch.randn(result.shape).to(result.dtype).to(result.device)
    for tensor in (result, *torch.autograd.grad(result, inputs, grad)):
        assert torch.isfinite(tensor.detach().cpu()).all()


def large(device: torch.device) -> None:
    """Attention at 11 x 900 and to images, a batch of 16; deformable attention of an encoder, two images; bfloat16.

    Deformable attention first without tensor cores and with samples sorted by ranks, then with both.
    """
    inputs = [tensor.detach().to(device, torch.bfloat16).requires_grad_() for tensor in cases.GPU_ATTENTION[1].make()]
    _with_backward(gd.ops.grouped_attention(*inputs, 11))
    case = replace(cases.GPU_CROSS_ATTENTION[0], batch=16)
    inputs = [tensor.detach().to(device, torch.bfloat16).requires_grad_() for tensor in case.make()]
    _with_backward(gd.ops.cross_attention(*inputs, case.padding(device), dropout_p=0.1))
    case = cases.GPU_DEFORMABLE[0]
    value, locations, weights = (tensor.detach().to(device) for tensor in case.make())
    inputs = [tensor.requires_grad_() for tensor in (value.bfloat16(), locations, weights)]
    for newer in (False, True):
        with deformable_products(newer), deformable_tiles(newer), deformable_shared_sort(newer):
            _with_backward(gd.ops.ms_deform_attn(inputs[0], case.levels, *inputs[1:]))


def _with_backward(result: Tensor) -> None:
    result.backward(torch.randn_like(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", choices=["small", "large"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    options = parser.parse_args()
    (small if options.sizes == "small" else large)(options.device)
    if options.device.type == "cuda":
        torch.cuda.synchronize(options.device)


if __name__ == "__main__":
    main()
