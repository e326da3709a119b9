"""Conditional DETR: published sizes and settings. Its equality with transformers is in test_checkpoints.py, what it
does with groups in test_groups_of_detectors.py."""

import pytest
import torch
from small_detectors import small_detector

import groupdetr_fast as gd


@pytest.mark.parametrize("name", ["conditional_detr_r50", "conditional_detr_r50_dc5"])
def test_parameter_count_is_the_published_one(name):
    model = gd.build_model(name, num_classes=91, num_groups=1)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 43.42


def test_dc5_halves_the_stride():
    images = torch.randn(1, 3, 64, 64)
    sizes = {}
    for name in ("conditional_detr_r50", "conditional_detr_r50_dc5"):
        sizes[name] = gd.build_model(name, num_classes=2, num_groups=1).backbone(images)[-1].shape
    assert sizes["conditional_detr_r50"] == (1, 2048, 2, 2)
    assert sizes["conditional_detr_r50_dc5"] == (1, 2048, 4, 4)


def test_defaults_are_the_published_ones():
    model = gd.build_model("conditional_detr_r50", num_classes=91, num_groups=11)
    config = model.config
    assert (config.num_queries, config.d_model, config.num_heads, config.dim_feedforward) == (300, 256, 8, 2048)
    assert (config.encoder_layers, config.decoder_layers, config.dropout) == (6, 6, 0.1)
    assert model.query_embed.weight.shape == (3300, 256)
    assert torch.allclose(model.class_embed.bias.sigmoid(), torch.full((91,), 0.01))
    assert not model.bbox_embed.layers[-1].weight.any()
    assert model.decoder.layers[0].ca_qpos_proj is not None
    assert model.decoder.layers[1].ca_qpos_proj is None
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_input_norm_gives_large_features_unit_scale():
    images = torch.randn(1, 3, 48, 64)
    spread = {}
    for input_norm in (True, False):
        model = small_detector("conditional_detr_r50", input_norm=input_norm, encoder_layers=0).eval()
        with torch.no_grad():
            for parameter in model.input_proj.parameters():
                parameter.mul_(1e3)
            spread[input_norm] = model.encode(images, None).tokens.std().item()
    assert spread[True] == pytest.approx(1, abs=0.05)
    assert spread[False] > 10


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("detr_r50", {}, "unknown model 'detr_r50'; the models are conditional_detr_r50"),
        ("conditional_detr_r50", {"queries": 3}, "has no setting 'queries'"),
        ("conditional_detr_r50", {"d_model": 36}, "d_model must be a multiple of 4 and of num_heads=8"),
        ("conditional_detr_r50", {"num_queries": 0}, "num_queries must be at least 1"),
        ("conditional_detr_r50", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        gd.build_model(name, num_classes=2, num_groups=1, **overrides)
