"""Trainings that make up for rare classes."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from digit_runs import weights

from groupdetr_fast import cli
from groupdetr_fast.data import CocoDataset
from groupdetr_fast.data.rare_classes import balanced_weights
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.train import train


@pytest.fixture
def config(config):
    optimization = replace(config.optimization, epochs=1, lr_drop=(1,))
    return replace(config, optimization=optimization, report=False, pictures=0, track=())


def differs(first, second, epoch=1):
    expected, found = weights(first, epoch), weights(second, epoch)
    return any(not torch.equal(expected[name], found[name]) for name in expected)


def test_balanced_weights_are_those_of_the_data(config, tmp_path):
    train(replace(config, output=tmp_path / "plain"))
    config = replace(config, class_weights="balanced", class_weights_beta=0.9)
    train(config)
    assert differs(tmp_path / "plain", config.output)
    kept = yaml.safe_load((config.output / "class_weights_used.yaml").read_text())
    dataset = CocoDataset(config.data.train_images, config.data.train_annotations)
    expected = balanced_weights(dataset.objects_of_classes(), 0.9)
    assert list(kept.values()) == pytest.approx(expected)
    assert len(set(kept.values())) > 1
    saved = from_yaml(CocoTrainingConfig, config.output / "config.yaml")
    assert (saved.class_weights, saved.class_weights_beta) == ("balanced", 0.9)
    # the same weights from a file, which the run keeps
    copied = tmp_path / "copied.yaml"
    copied.write_text((config.output / "class_weights_used.yaml").read_text())
    again = replace(config, class_weights=str(copied), output=tmp_path / "again")
    train(again)
    assert not differs(config.output, again.output)
    copied.unlink()
    train(replace(from_yaml(CocoTrainingConfig, again.output / "config.yaml"), output=tmp_path / "third"))
    assert not differs(config.output, tmp_path / "third")


def test_other_weights_of_a_resumed_run_are_said(config, tmp_path, caplog):
    path = tmp_path / "weights.yaml"
    path.write_text("'3': 2\n")
    config = replace(config, class_weights=str(path))
    train(config)
    longer = replace(config, resume=True, optimization=replace(config.optimization, epochs=2))
    train(longer)
    assert "class_weights" not in caplog.text
    path.write_text("'3': 4.5\n")
    train(replace(longer, optimization=replace(config.optimization, epochs=3)))
    assert "resuming with another content of" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'33': 2\n", "the data have no class '33'"),
        ("3: -1\n", "the weight of '3' must be a positive number, got -1"),
        ("3: two\n", "the weight of '3' must be a positive number, got 'two'"),
        ("- 3\n", "must have names of classes with weights, such as 'cat: 2.0'"),
        ("{", "cannot be read as yaml"),
    ],
)
def test_wrong_files_are_refused(config, tmp_path, text, message):
    path = tmp_path / "weights.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        train(replace(config, class_weights=str(path)))
    assert "weights.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class-weights", "balanced", "--repeat-factor-threshold", "0.1"], "make up for rare classes, and together"),
        (["--class-weights-beta", "0"], "class_weights_beta must be in (0, 1], got 0"),
    ],
)
def test_wrong_settings_end_the_command(config, tmp_path, flags, message):
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    with pytest.raises(SystemExit, match=re.escape(message)):
        cli.main(["train", "--config", str(tmp_path / "config.yaml"), *flags])


def test_a_missing_file_is_named(config, tmp_path):
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    command = ["train", "--config", str(tmp_path / "config.yaml"), "--class-weights", "none.yaml"]
    with pytest.raises(SystemExit, match=r"class_weights must be balanced or a yaml file .*: there is no none\.yaml"):
        cli.main(command)


def test_models_of_transformers_take_no_weights():
    with pytest.raises(ValueError, match=r"class_weights are not for models of transformers, .* repeat images of rare"):
        CocoTrainingConfig().with_settings(model="transformers:some/model", class_weights="balanced")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_rare_classes_come_more_often_also_after_resuming(config, tmp_path, workers):
    data = replace(config.data, repeat_factor_threshold=0.5, workers=workers)
    config = replace(config, data=data, optimization=replace(config.optimization, epochs=2), checkpoint_every=2)
    seen = []
    train(config, observe=lambda step, model, output, targets: seen.append(len(targets.sizes)))
    repeats = CocoDataset(data.train_images, data.train_annotations).repeat_factors(0.5)
    per_epoch = int(repeats.sum().ceil())
    assert per_epoch > len(repeats)
    assert sum(seen) == 2 * per_epoch
    begun = replace(config, output=tmp_path / "begun", optimization=replace(config.optimization, epochs=1))
    train(begun)
    train(replace(config, output=begun.output, resume=True))
    assert not differs(config.output, begun.output, epoch=2)
