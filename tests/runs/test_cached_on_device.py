"""Runs whose images lie on the device: on the CPU, bit for bit those that load them."""

import logging
from dataclasses import replace

import pytest
import torch
from digit_runs import weights

from groupdetr_fast.analysis.inference import evaluate_usages
from groupdetr_fast.data import CocoDataset, device_images
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.data.device_images import CacheRefused, DeviceImages
from groupdetr_fast.runs import loaders
from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.find_rate import find_rate
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.engine import Trainer
from groupdetr_fast.training.rate_finder import SweepSettings


@pytest.fixture
def config(config):
    """Two epochs of three steps, in which only the flip is random."""
    augmentation = replace(config.augmentation, short_sides=(40,), crop=0.0)
    optimization = replace(config.optimization, epochs=2)
    return replace(
        config,
        augmentation=augmentation,
        optimization=optimization,
        evaluate_every=2,
        pictures=0,
        report=False,
        track=(),
    )


def on_device(config, output, **settings):
    data = replace(config.data, cache_images=True, **{"cache_on": "device", **settings})
    return replace(config, data=data, output=output)


@pytest.fixture
def loaded(config):
    """The weights of a run that loads its images."""
    metrics = train(config)["epochs"][-1]["metrics"]
    return weights(config.output, 2), metrics


def assert_same(output, loaded):
    found = weights(output, 2)
    assert found.keys() == loaded[0].keys()
    assert [name for name in found if not torch.equal(found[name], loaded[0][name])] == []


def test_a_run_is_that_which_loads_images(config, loaded, tmp_path, monkeypatch):
    batches = []
    original = DeviceImages.__getitems__
    monkeypatch.setattr(
        DeviceImages, "__getitems__", lambda self, keys: (batches.append(keys), original(self, keys))[1]
    )
    there = on_device(config, tmp_path / "there")
    metrics = train(there)["epochs"][-1]["metrics"]
    assert_same(there.output, loaded)
    assert metrics == loaded[1]
    assert len(batches) == 2 * 3 + 1  # of training, and of the evaluation of four images
    assert {epoch for keys in batches[:-1] for epoch, _ in keys} == {0, 1}


def test_a_run_goes_on_within_an_epoch(config, loaded, tmp_path, monkeypatch):
    there = replace(on_device(config, tmp_path / "there"), checkpoint_every=1)
    original = Trainer.run_step

    def interrupt_in_the_second_epoch(trainer, batches):
        if trainer.state.batches == 4:
            raise KeyboardInterrupt
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "run_step", interrupt_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(there)
    monkeypatch.undo()
    assert latest_checkpoint(there.output).name == "epoch_0001_batch_000001"
    train(replace(there, resume=True))
    assert_same(there.output, loaded)


def test_checkpoints_are_evaluated_from_the_device(config, loaded, tmp_path):
    checkpoint = latest_checkpoint(config.output)
    there = on_device(config, tmp_path / "there")
    assert evaluate_checkpoint(replace(there, model=replace(there.model, load=checkpoint))) == loaded[1]
    assert evaluate_usages(there, checkpoint, 0.7) == evaluate_usages(config, checkpoint, 0.7)


def test_a_sweep_of_rates_takes_images_from_the_device(config, tmp_path):
    settings = SweepSettings(rate_from=1e-5, rate_steps=10)
    expected = find_rate(replace(config, output=tmp_path / "here"), settings)
    assert find_rate(on_device(config, tmp_path / "there"), settings).losses == expected.losses


def test_what_the_device_cannot_have_is_refused_before_the_model_is_built(config, tmp_path, monkeypatch):
    there = on_device(config, tmp_path / "there")
    there = replace(there, augmentation=replace(there.augmentation, crop=0.5))
    monkeypatch.setattr("groupdetr_fast.runs.config.ModelConfig.build", None)
    with pytest.raises(CacheRefused, match=r"cache_on device holds .* crop=0\.5"):
        train(there)


def test_auto_takes_the_host_where_the_device_cannot_have_them(config, loaded, tmp_path, monkeypatch, caplog):
    """Both sets where memory is short; of each the reason is logged."""
    monkeypatch.setattr(device_images, "_free_memory", lambda device: 1000)
    kept = []
    original = CocoDataset.cache_images
    monkeypatch.setattr(CocoDataset, "cache_images", lambda self: (kept.append(len(self)), original(self))[1])
    there = on_device(config, tmp_path / "there", cache_on="auto", workers=0)
    with caplog.at_level(logging.INFO, loaders.logger.name):
        train(there)
    assert_same(there.output, loaded)
    assert kept == [10, 4]
    assert caplog.text.count("are kept on the host: cache_on device: ") == 2


def test_auto_takes_the_device_where_it_can(config, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(CocoDataset, "cache_images", None)
    there = on_device(config, tmp_path / "there", cache_on="auto", workers=2)
    train(there)
    assert_same(there.output, loaded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_on": "device"}, "cache_on device says where images are kept: give cache_images, too"),
        ({"cache_images": True, "cache_on": "device", "workers": 2}, "workers load images on the host"),
        ({"cache_images": True, "cache_on": "disk"}, "cache_on must be one of host, device, auto, got 'disk'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_the_default_number_of_workers_is_none():
    assert DataConfig(cache_images=True, cache_on="device").resolved_workers() == 0


def test_a_checkpoint_that_knows_of_unreadable_images_is_resumed(config, tmp_path, monkeypatch):
    """They were replaced since: on the device every image is there."""
    there = replace(on_device(config, tmp_path / "there"), checkpoint_every=1)
    monkeypatch.setattr("groupdetr_fast.training.state.TrainingState.unreadable", lambda state: [3])
    train(replace(there, optimization=replace(there.optimization, epochs=1)))
    monkeypatch.undo()
    assert train(replace(there, resume=True))["epochs"][-1]["unreadable_images"] == 0
