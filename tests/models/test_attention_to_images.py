"""Dense detectors attend to padded images by ``ops.cross_attention`` where a GPU serves it; a CPU stands for one."""

from unittest import mock

import pytest
import torch

import groupdetr_fast as gd
from groupdetr_fast.layers import attention

TINY = {"num_queries": 8, "d_model": 32, "num_heads": 4, "dim_feedforward": 32, "backbone": "conv:8-8-8-8"}


def outputs_and_gradients(model, precision):
    torch.manual_seed(0)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[1, :, 48:] = True
    targets = gd.PackedTargets.from_list([{"labels": torch.tensor([1, 2]), "boxes": torch.full((2, 4), 0.3)}] * 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model(torch.randn(2, 3, 64, 64), masks, targets)
    model.zero_grad()
    (out.logits.float().square().mean() + out.boxes.float().square().mean()).backward()
    return out.logits, out.boxes, *(each.grad for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["conditional_detr_r50", "dab_detr_r50", "dn_detr_r50"])
def test_by_the_op_in_every_layer(name, precision, monkeypatch):
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    model = gd.build_model(name, num_classes=5, num_groups=2, dropout=0.0, **layers, **TINY).train()
    expected = outputs_and_gradients(model, precision)
    half = mock.Mock(side_effect=lambda query, *_: precision == "float32" or query.dtype == torch.bfloat16)
    monkeypatch.setattr(attention, "is_preferred", half)
    calls = mock.Mock(wraps=attention.ops.cross_attention)
    monkeypatch.setattr(attention.ops, "cross_attention", calls)
    found = outputs_and_gradients(model, precision)
    assert calls.call_count == half.call_count == sum(layers.values())
    for own, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, torchs, **({} if precision == "float32" else {"rtol": 0.1, "atol": 0.02}))
