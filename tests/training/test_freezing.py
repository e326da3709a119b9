"""Parts that are not trained, by name, and rates that fall from layer to layer of a backbone."""

import pytest
import torch
from torch import nn

import groupdetr_fast as gd
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.freezing import freeze
from groupdetr_fast.training.optimization import build_optimizer, described_groups

SMALL = {"num_queries": 3, "d_model": 16, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 1}


def detector(backbone="conv:4-8"):
    torch.manual_seed(0)
    return gd.build_model("conditional_detr_r50", num_classes=2, num_groups=2, backbone=backbone, **SMALL)


class AsInTransformers(nn.Module):
    """A wrapper around a model that has its own body in ``model``."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["backbone"], lambda name: name.startswith("backbone.")),
        (["encoder.layers.0"], lambda name: name.startswith("encoder.layers.0.")),
        (["encoder.layers.[!0]"], lambda name: name.startswith("encoder.layers.1.")),
        (["*.bias", "backbone"], lambda name: name.endswith(".bias") or name.startswith("backbone.")),
    ],
)
def test_patterns_name_parameters_and_modules(patterns, expected):
    model = detector()
    frozen = freeze(model, patterns)
    assert frozen == [name for name, _ in model.named_parameters() if expected(name)]
    assert len(frozen) > 1
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_the_beginning_of_names_of_transformers_may_be_left_out():
    for pattern in ("backbone", "model.backbone", "model.model.backbone", "backbone.*"):
        assert freeze(AsInTransformers(), [pattern]) == ["model.model.backbone.weight", "model.model.backbone.bias"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["backbon"], r"no parameter matches 'backbon': did you mean backbone\b"),
        (["encoder.layer.0"], r"no parameter matches 'encoder.layer.0': did you mean encoder.layers.0\b"),
        (["zzzz"], r"no parameter matches 'zzzz'; the model's parts are .*backbone.*encoder.*decoder"),
        (["backbone", "x.*"], r"no parameter matches 'x\.\*'"),
        (["*"], r"\* leave no parameter to train: name fewer parts"),
    ],
)
def test_patterns_that_leave_nothing_are_refused(patterns, message):
    with pytest.raises(ValueError, match=f"freeze: {message}"):
        freeze(detector(), patterns)


def test_parts_are_given_as_several():
    assert OptimizationConfig(freeze=["backbone"]).freeze == ("backbone",)
    with pytest.raises(ValueError, match="freeze must be a list, each entry a text, got 'backbone'"):
        OptimizationConfig(freeze="backbone")


def test_statistics_of_frozen_batch_norms_stay():
    model = detector()
    freeze(model, ["backbone.body.stages.0"])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model.eval().train()
    model(torch.rand(2, 3, 16, 16))
    changed = [not torch.equal(old, norm.running_mean) for old, norm in zip(before, norms, strict=True)]
    assert changed == [False, False, True, True]
    assert model.training
    assert [norm.training for norm in norms] == [False, False, True, True]


def test_a_norm_without_parameters_goes_with_its_part():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, affine=False)), "b": nn.Linear(1, 1)}
    )
    freeze(model, ["a"])
    assert not model.train()["a"][1].training


def test_rates_fall_from_layer_to_layer_of_a_vit():
    model = detector("timm:vit_tiny_patch16_224")
    config = OptimizationConfig(backbone_layer_decay=0.5, backbone_lr=1.0, lr=3.0)
    optimizer = build_optimizer(model, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = "backbone.body.network.blocks."
    # frozen_stages = 2 leaves the stem and the first two of twelve blocks untrained
    assert {int(name.removeprefix(blocks).split(".")[0]) for name in found if name.startswith(blocks)} == {
        *range(2, 12)
    }
    for name, rate in found.items():
        if name.startswith(blocks):
            assert rate == 0.5 ** (11 - int(name.removeprefix(blocks).split(".")[0]))
        elif not name.startswith("backbone."):
            assert rate == 3.0
    # class token and positions belong to the stem
    assert [group["lr"] for group in optimizer.param_groups] == [
        3.0,
        0.5**12,
        *(0.5**power for power in range(9, -1, -1)),
    ]
    lines = described_groups(optimizer)
    assert len(lines) == len(optimizer.param_groups)
    assert "lr 3  weight decay 0.0001" in lines[0]


def test_without_a_decay_the_groups_are_two():
    optimizer = build_optimizer(detector("timm:vit_tiny_patch16_224"), OptimizationConfig())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-5]


def test_backbones_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"backbone_layer_decay=0.8 needs a backbone timm:NAME.*ConditionalDetr"):
        build_optimizer(detector(), OptimizationConfig(backbone_layer_decay=0.8))
    for wrong in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"backbone_layer_decay must be in \(0, 1\]"):
            OptimizationConfig(backbone_layer_decay=wrong)
