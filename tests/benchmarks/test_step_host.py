"""The parts of a step beside the model do the same work both ways, and here with fewer operators."""

import torch

from cpu.step_host import HERE, PLAIN, Operators, cut_down, parts_of_a_step
from groupdetr_fast import build_model

TINY = {"num_queries": 4, "d_model": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2}


def test_parts_of_a_step():
    torch.manual_seed(0)
    model = build_model("conditional_detr_r50", num_classes=3, num_groups=2, backbone_weights=None, **TINY)
    losses = {name: torch.rand(()) for name in ("loss", "loss_ce", "loss_bbox")}
    parts = parts_of_a_step(cut_down(model), losses)
    weights = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    for ways in parts.values():
        for way in (PLAIN, HERE):
            ways[way]()
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(not torch.equal(*pair) for pair in zip(weights, changed, strict=True))

    def operators(part):
        numbers = {}
        for way in (PLAIN, HERE):
            with Operators() as counted:
                parts[part][way]()
            numbers[way] = counted.number
        return numbers

    assert operators("sums of losses") == {PLAIN: 3, HERE: 2}
    casts = operators("casts of weights to bfloat16, and of their gradients back")
    assert casts[HERE] == 3  # of frozen weights, of the others, of gradients
    assert casts[PLAIN] > 100
