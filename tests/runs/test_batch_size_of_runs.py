"""``batch_size`` "auto" in trainings, with a memory for so many images."""

import weakref
from dataclasses import replace

import pytest
import torch
from digit_runs import weights

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.commands import train as train_command
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.layers.backbone import Backbone
from groupdetr_fast.runs.batch_size import largest_batch, with_batch_size
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.loaders import training_set
from groupdetr_fast.runs.recipes import find_recipe
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import batch_size
from groupdetr_fast.training.faults import TrainingError


class Memory:
    def clear(self):
        pass

    def peak(self):
        return 0.5


@pytest.fixture
def memory(monkeypatch):
    """A function that gives this process memory for so many images; sizes that were tried come in the list."""
    tried = []
    original = Backbone.forward
    monkeypatch.setattr(batch_size, "memory_of", lambda device: Memory())

    def limit(images):
        def forward(self, batch):
            tried.append(tuple(batch.shape))
            if len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return original(self, batch)

        monkeypatch.setattr(Backbone, "forward", forward)
        return tried

    return limit


@pytest.fixture
def config(config):
    optimization = replace(config.optimization, epochs=1, lr_drop=(1,), batch_size="auto", images_per_step=8)
    return replace(config, optimization=optimization, report=False, pictures=0, track=())


def same(first, second, epoch=1):
    expected, found = weights(first, epoch), weights(second, epoch)
    return all(torch.equal(expected[name], found[name]) for name in expected)


def with_optimization(config, **settings):
    return replace(config, optimization=replace(config.optimization, **settings))


def test_the_training_is_that_with_the_number_that_was_found(config, memory, tmp_path):
    models, left = [], []
    original = ModelConfig.build_untrained

    def build_untrained(self, num_classes, **options):
        model = original(self, num_classes, **options)
        model.cycle = [model]  # as models of others have them
        models.append(weakref.ref(model))
        return model

    def found(*arguments):
        numbers = with_batch_size(*arguments)
        left.extend(model() for model in models)
        return numbers

    tried = memory(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "build_untrained", build_untrained)
        patch.setattr("groupdetr_fast.runs.train.with_batch_size", found)
        train(config)
    assert left == [None]  # nothing is left of what was tried
    # of the divisors of 8 images, 4 is the largest that is not above 5
    assert [size[0] for size in tried[:3]] == [1, 1, 1]
    assert sorted({size[0] for size in tried if size[2:] == (96, 96)}) == [1, 2, 4, 8]
    assert {size[2:] for size in tried[:3]} == {(96, 96)}  # crops of 24 x 48, resized to 48 x 96
    saved = from_yaml(CocoTrainingConfig, config.output / "config.yaml")
    assert (saved.optimization.batch_size, saved.optimization.accumulate) == (4, 2)
    assert (
        "batch_size auto: 4 images, the largest that fits; accumulate 2 for steps of 8 images over all processes"
        in (config.output / "train.log").read_text()
    )
    plain = with_optimization(replace(config, output=tmp_path / "plain"), batch_size=4, accumulate=2)
    train(plain)
    assert same(config.output, plain.output)
    train(replace(saved, output=tmp_path / "again"))
    assert same(config.output, tmp_path / "again")


def test_a_run_is_resumed_with_the_numbers_that_it_began_with(config, memory, tmp_path):
    memory(5)
    train(config)
    memory(2)  # somebody else uses the device now
    longer = with_optimization(replace(config, resume=True), epochs=2)
    with pytest.raises(TrainingError, match=r"out of memory.* than --batch-size 4"):
        train(longer)
    tried = memory(4)
    del tried[:]
    train(longer)
    assert max(size[0] for size in tried) == 4
    assert "batch_size auto: 4 images, as the run began; accumulate 2" in (config.output / "train.log").read_text()
    train(with_optimization(replace(longer, output=tmp_path / "whole", resume=False), batch_size=4, accumulate=2))
    assert same(config.output, tmp_path / "whole", epoch=2)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"groups_per_pass": 1, "ema_decay": 0.9}, {}),
        ({"recompute_layers": True, "precision": "bf16"}, {}),
        ({"freeze": ("backbone",)}, {"class_weights": "balanced"}),
    ],
)
def test_it_goes_with_what_saves_memory(config, memory, settings, changes):
    memory(3)
    train(replace(with_optimization(config, **settings), **changes))
    saved = from_yaml(CocoTrainingConfig, config.output / "config.yaml").optimization
    assert (saved.batch_size, saved.accumulate) == (2, 4)


def test_a_memory_without_room_for_an_image_is_said(config, memory):
    memory(0)
    message = "the device has not enough memory for a step on one image: pass --groups-per-pass 1, --recomp"
    with pytest.raises(TrainingError, match=message):
        train(config)


def test_a_cpu_is_refused_before_anything_is_read(config, tmp_path):
    missing = replace(config, data=replace(config.data, train_annotations=tmp_path / "missing.json"))
    (tmp_path / "config.yaml").write_text(missing.as_yaml())
    with pytest.raises(SystemExit, match="error: batch_size auto goes by the memory of a CUDA GPU"):
        cli.main(["train", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(ValueError, match="batch_size auto goes by the memory of a CUDA GPU"):
        gd.Detector().train(output=tmp_path / "run", batch_size="auto")


def test_the_flag_and_the_recipe(monkeypatch):
    started = []
    monkeypatch.setattr(train_command, "train", started.append)
    cli.main(["train", "--recipe", "conditional_detr_r50_dc5_12e", "--batch-size", "auto"])
    cli.main(["train", "--recipe", "dab_detr_r50_12e", "--batch-size", "auto", "--images-per-step", "32"])
    cli.main(["train", "--batch-size", "3"])
    found = [(each.optimization.batch_size, each.optimization.images_per_step) for each in started]
    assert found == [("auto", 8), ("auto", 32), (3, 16)]
    with pytest.raises(SystemExit):
        cli.main(["train", "--batch-size", "some"])
    assert find_recipe("dab_detr_r50_12e").config(processes=4).optimization.images_per_step == 16


@pytest.mark.parametrize("copy_paste", [0.0, 0.5])
def test_batches_that_are_tried_are_as_large_and_full_as_they_can_be(shared_data, tmp_path, copy_paste):
    folder = shared_data("nuclei")
    config = CocoTrainingConfig().with_settings(
        model="mask2former_r50",
        train_images=folder / "images",
        train_annotations=folder / "annotations" / "instances_train.json",
    )
    config = replace(config, augmentation=AugmentationConfig(jitter_size=64, copy_paste=copy_paste))
    dataset = training_set(config)
    most = max(len(dataset.ground_truth(index)["labels"]) for index in range(len(dataset)))
    batch = largest_batch(config, dataset, 3)
    expected = most * (2 if copy_paste else 1)
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.sizes == (expected,) * 3
    assert [tuple(mask.shape) for mask in batch.targets.masks] == [(expected, 64, 64)] * 3
    assert batch.to("cpu").images.dtype == torch.float32
