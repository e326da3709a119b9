"""Trainings of which parts are frozen, and of which each layer of the backbone has a rate of its own."""

from dataclasses import replace

import pytest
import torch
from digit_runs import weights

from groupdetr_fast import cli
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.train import train

ONE_EPOCH = {"epochs": 1, "lr_drop": (1,)}


@pytest.fixture
def config(config):
    """A run without what no test here looks at."""
    return replace(config, report=False, pictures=0, track=(), data=replace(config.data, cache_images=True))


def with_optimization(config, **settings):
    return replace(config, optimization=replace(config.optimization, **settings))


@pytest.mark.parametrize("passes", [0, 1])
def test_frozen_parts_stay_and_the_others_are_trained(config, passes):
    config = replace(config, model=replace(config.model, backbone="conv:8-16"), checkpoint_every=1)
    config = with_optimization(
        config, freeze=("backbone", "encoder.layers.0.norm?"), ema_decay=0.5, groups_per_pass=passes, **ONE_EPOCH
    )
    train(replace(config, optimization=replace(config.optimization, lr=0.0, backbone_lr=0.0, freeze=())))
    start = weights(config.output, 1)  # but for the statistics of its batch norms
    train(replace(config, overwrite=True))
    trained = weights(config.output, 1)
    same = {name for name in trained if torch.equal(trained[name], start[name])}
    frozen = {name for name in trained if name.startswith(("backbone.", "encoder.layers.0.norm"))}
    statistics = {name for name in frozen if "running" in name or "batches" in name}
    assert same == frozen - statistics
    assert all(trained[name].eq(name.endswith("running_var")).all() for name in statistics)  # as they begin
    assert "frozen: " in (config.output / "train.log").read_text()


def test_a_training_of_a_part_is_resumed_bit_for_bit(config):
    whole = with_optimization(config, freeze=("backbone", "encoder"), epochs=2)
    train(whole)
    begun = replace(with_optimization(whole, epochs=1), output=config.output.with_name("begun"))
    train(begun)
    train(replace(whole, output=begun.output, resume=True))
    expected, found = weights(whole.output, 2), weights(begun.output, 2)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match=r"was begun with optimization.freeze = \('backbone', 'encoder'\)"):
        train(replace(with_optimization(whole, freeze=("backbone",)), output=begun.output, resume=True))


def test_frozen_parts_are_a_setting_of_the_configuration(config, tmp_path):
    config = with_optimization(config, freeze=("backbone", "*.bias"))
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    assert from_yaml(CocoTrainingConfig, tmp_path / "config.yaml").optimization == config.optimization


def test_a_misspelt_part_ends_the_command(config, tmp_path):
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    with pytest.raises(SystemExit, match="error: freeze: no parameter matches 'backbones': did you mean backbone"):
        cli.main(["train", "--config", str(tmp_path / "config.yaml"), "--freeze", "backbones", "encoder"])


def test_a_vit_with_a_rate_for_each_layer_is_trained_and_resumed(config):
    sides = AugmentationConfig(short_sides=(32,), crop=0.0, eval_short_side=32)
    model = replace(config.model, backbone="timm:vit_tiny_patch16_224", backbone_stages=3, frozen_stages=1)
    config = with_optimization(
        replace(config, model=model, augmentation=sides),
        backbone_layer_decay=0.8,
        ema_decay=0.9,
        freeze=("*.patch_embed",),
        epochs=2,
        lr_drop=(1,),
    )
    train(config)
    log = (config.output / "train.log").read_text()
    assert [f"lr {rate:.3g} " in log for rate in (1e-3, 8e-4)] == [True, True]
    assert log.count("trained: ") >= 3
    begun = replace(with_optimization(config, epochs=1), output=config.output.with_name("begun"))
    train(begun)
    train(replace(config, output=begun.output, resume=True))
    expected, found = weights(config.output, 2), weights(begun.output, 2)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
