"""Floating-point operations of a training step, counted on tensors without data."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from cpu import bench_conditional_detr
from groupdetr_fast import QueryGroups
from harness.cases import Detection

__all__ = ["step_operations"]


def step_operations(case: Detection) -> int:
    """Of products of matrices and convolutions, in the forward and backward pass of Conditional DETR."""
    with torch.device("meta"):
        model = bench_conditional_detr.build(case).train()
    images, masks, _ = case.make()
    grouped_attention = {
        torch.ops.groupdetr_fast.grouped_attention: _attention_operations(products=2),
        torch.ops.groupdetr_fast.grouped_attention_backward: _attention_operations(products=5),
    }
    with FlopCounterMode(display=False, custom_mapping=grouped_attention) as counter:
        out = model(images.to("meta"), masks.to("meta"))
        (out.logits.sum() + out.boxes.sum()).backward()
    return counter.get_total_flops()


def _attention_operations(products: int):
    """Of an attention with equally large heads of queries, keys and values; backward recomputes the scores."""

    def operations(*arguments, out_shape=None, **options) -> int:
        layout = next(argument for argument in arguments if isinstance(argument, list))
        batch, _, heads, channels = arguments[1]  # of the query in backward, of the key in forward: the same
        pairs = sum(
            (segment.stop - segment.start) * sum(stop - start for start, stop in segment.key_ranges)
            for segment in QueryGroups.from_ints(layout).segments
        )
        return products * 2 * batch * heads * pairs * channels

    return operations
