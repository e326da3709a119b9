"""The detectors with deformable attention: published sizes, settings, and no wait for the device. Their groups are
tested in test_groups_of_detectors.py, their layers in tests/layers/test_deformable_layers.py."""

import math

import pytest
import torch
from small_detectors import SMALL, small_detector
from torch._subclasses.fake_tensor import FakeTensorMode

import groupdetr_fast as gd

DETECTORS = ("dab_deformable_detr_r50", "dino_4scale_r50")


@pytest.mark.parametrize(("name", "millions"), [("dab_deformable_detr_r50", 47.41), ("dino_4scale_r50", 46.89)])
def test_parameter_count_is_the_published_one(name, millions):
    model = gd.build_model(name, num_classes=91, num_groups=1)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", DETECTORS)
def test_defaults_are_the_published_ones(name):
    model = gd.build_model(name, num_classes=91, num_groups=1)
    config = model.config
    assert (config.d_model, config.num_heads, config.dim_feedforward, config.dropout) == (256, 8, 2048, 0.0)
    assert (config.encoder_layers, config.decoder_layers) == (6, 6)
    assert (config.num_levels, config.backbone_levels, config.num_points) == (4, 3, 4)
    assert (config.class_loss, config.l1_loss, config.giou_loss, config.class_cost) == (1, 5, 2, 2)
    assert [projection[0].stride for projection in model.input_proj] == [(1, 1)] * 3 + [(2, 2)]
    assert [projection[1].num_groups for projection in model.input_proj] == [32] * 4
    frozen = {key.split(".")[2] for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "layer1"}


@pytest.mark.parametrize(
    ("name", "temperature", "offset"), [("dab_deformable_detr_r50", 10000, -0.5), ("dino_4scale_r50", 20, 0)]
)
def test_position_embedding_is_that_of_the_original_repository(name, temperature, offset):
    """The two repositories differ in where they count from and in the longest wave."""
    model = small_detector(name, num_groups=1).eval()
    seen = []
    model.encoder.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[1] - model.level_embed[0]))
    model(torch.randn(1, 3, 48, 64))
    height, width = 24, 32  # of the first level
    row, column, channel = 5, 7, 6  # the fourth sine of y, of 16 channels
    y, x = (row + 1 + offset) / height, (column + 1 + offset) / width
    frequency = 2 * math.pi / temperature ** (channel / 16)
    embedding = seen[0][0, row * width + column]
    expected = [math.sin(y * frequency), math.cos(y * frequency), math.sin(x * frequency), math.cos(x * frequency)]
    assert embedding[[channel, channel + 1, 16 + channel, 17 + channel]].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_group_parameters_are_those_that_grow_with_groups(name):
    one, three = (small_detector(name, num_groups).state_dict() for num_groups in (1, 3))
    grown = {key for key in one if one[key].shape != three[key].shape}
    assert grown == set(small_detector(name).group_parameters)
    assert all(len(three[key]) == 3 * len(one[key]) for key in grown)


@pytest.mark.parametrize("name", DETECTORS)
def test_traces_with_fake_gpu_tensors(name):
    """On tensors without data, any host synchronisation (item, cpu, nonzero, boolean indexing) raises."""
    with FakeTensorMode(), torch.device("cuda"):
        model = gd.build_model(name, num_classes=5, num_groups=3, **SMALL)
        images = torch.empty(2, 3, 48, 64)
        masks = torch.empty(2, 48, 64, dtype=torch.bool)
        targets = gd.PackedTargets(
            torch.empty(2, 3, dtype=torch.int64), torch.empty(2, 3, 4), torch.empty(2, dtype=torch.int64), (3, 1)
        )
        out = model(images, masks, targets)
        assert out.boxes.device.type == "cuda"
        assert out.boxes.shape == (2, 2, 18, 4)
        assert (out.denoising is not None) == (name == "dino_4scale_r50")


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_points": 0}, "num_points must be at least 1, got 0"),
        ({"backbone_levels": 0}, r"backbone_levels must be in \[1, num_levels\], got 0 of 4 levels"),
        ({"backbone_levels": 3, "num_levels": 2}, r"backbone_levels must be in \[1, num_levels\], got 3 of 2 levels"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        gd.build_model(name, num_classes=2, num_groups=1, **overrides)
