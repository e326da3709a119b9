"""A batch of one image against the same image twice, which has the same statistics and so the same gradients.

torch's BatchNorm2d on CPUs permutes the gradient of a single image that comes with the strides (C, 1, W * C, C), as
tokens give it (torch 2.14.1). Compared is in float64: in float32 statistics of twice as many pixels differ by rounding,
which now and then moves an input of a ReLU over 0, and gradients by up to some hundredths.
"""

import pytest
import torch
from small_detectors import outputs, small_detector
from torch import nn

from groupdetr_fast.layers.frozen_batch_norm import FrozenBatchNorm2d
from groupdetr_fast.models import model_names

BACKBONES = ["conv:8-16-16-16", "resnet18", "timm:resnet10t"]
QUICK = {"dab_deformable_detr_r50"}  # of the backbones that take seconds
CASES = [
    pytest.param(name, backbone, marks=() if name in QUICK or backbone.startswith("conv:") else pytest.mark.slow)
    for name in model_names()
    for backbone in BACKBONES
    if "dc5" not in name or backbone.startswith("timm:")  # of these only timm's has dilation
]


def with_norms(model, trained):
    """The model with the batch norms of its backbone trained or frozen, whichever they are by default."""
    for parent in list(model.backbone.modules()):
        for name, norm in list(parent.named_children()):
            if trained and isinstance(norm, FrozenBatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(len(norm.weight)))
    if trained and hasattr(model.backbone.body, "network"):
        import timm

        timm.layers.unfreeze_batch_norm_2d(model.backbone)
    model.train()
    found = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert found or not trained
    for norm in found:
        norm.train(trained)
    return model


def gradients(model, images):
    """Of a sum of the outputs of the first image and its copies, whose weights are random, divided by their number."""
    out = outputs(model(images))
    weights = torch.randn(out[:, :1].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ((out * weights).sum() / len(images)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("trained", [True, False], ids=["trained norms", "frozen norms"])
@pytest.mark.parametrize(("name", "backbone"), CASES)
def test_one_image_has_the_gradients_of_the_same_image_twice(name, backbone, trained):
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    model = with_norms(small_detector(name, backbone=backbone, dropout=0.0, frozen_stages=0), trained).double()
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    alone, twice = gradients(model, image), gradients(model, image.repeat(2, 1, 1, 1))
    assert any(name.startswith("backbone.") for name in alone)
    largest = max(gradient.abs().max() for gradient in alone.values()).item()
    torch.testing.assert_close(twice, alone, rtol=1e-9, atol=1e-12 * largest)
