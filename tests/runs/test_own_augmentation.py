"""Trainings with transforms of one's own and with pasted objects."""

import json
from dataclasses import replace

import pytest
import torch
from digit_runs import weights

from groupdetr_fast import cli
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.train import train

ROTATION = """from torchvision.transforms import v2


class Rotation(v2.RandomRotation):
    pass


def build():
    return v2.Compose([Rotation(15), v2.ColorJitter(0.3, 0.3)])
"""


@pytest.fixture
def config(config, tmp_path):
    """A run of an epoch with a transform from a file."""
    (tmp_path / "mine.py").write_text(ROTATION)
    return replace(
        config,
        augmentation=replace(config.augmentation, transforms=f"{tmp_path / 'mine.py'}:build"),
        optimization=replace(config.optimization, epochs=1, lr_drop=(1,)),
        report=False,
        pictures=0,
        track=(),
    )


def same(first, second, epoch=1):
    expected, found = weights(first, epoch), weights(second, epoch)
    return all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_keeps_the_file_and_is_repeated_by_it(config, tmp_path):
    train(config)
    kept = config.output / "transforms_used.py"
    assert kept.read_text() == ROTATION
    (tmp_path / "mine.py").unlink()
    saved = from_yaml(CocoTrainingConfig, config.output / "config.yaml")
    assert saved.augmentation.transforms == f"{kept}:build"
    again = replace(saved, output=tmp_path / "again", data=replace(saved.data, workers=2, cache_images=True))
    train(again)
    assert same(config.output, again.output)
    without = replace(config, output=tmp_path / "without", augmentation=replace(config.augmentation, transforms=None))
    train(without)
    assert not same(config.output, without.output)
    assert not (without.output / "transforms_used.py").exists()
    train(replace(without, output=config.output, overwrite=True))
    assert not kept.exists()


def test_a_run_with_its_own_file_is_resumed_and_says_what_changed(config, tmp_path, caplog):
    longer = replace(config, optimization=replace(config.optimization, epochs=2))
    train(replace(longer, output=tmp_path / "whole"))
    train(config)
    train(replace(longer, resume=True))
    assert same(tmp_path / "whole", config.output, epoch=2)
    assert "transforms" not in caplog.text
    (tmp_path / "mine.py").write_text(ROTATION.replace("15", "30"))
    train(replace(longer, resume=True, optimization=replace(config.optimization, epochs=3)))
    kept = config.output / "transforms_used.py"
    assert f"resuming with another content of {kept} than the run began with" in caplog.text


def test_a_fault_of_the_file_ends_the_command_at_once(config, tmp_path):
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    (tmp_path / "wrong.py").write_text(ROTATION)
    command = ["train", "--config", str(tmp_path / "config.yaml"), "--transforms", f"{tmp_path / 'wrong.py'}:built"]
    with pytest.raises(SystemExit, match=r"error: transforms: .*wrong.py has no function built: it has build"):
        cli.main(command)
    assert not (config.output / "checkpoints").exists()


def small_segmenter(folder, output):
    return CocoTrainingConfig(
        data=DataConfig(
            train_images=folder / "images",
            train_annotations=folder / "annotations" / "instances_train.json",
            val_images=folder / "images",
            val_annotations=folder / "annotations" / "instances_val.json",
            workers=2,
        ),
        model=ModelConfig(
            model="mask2former_r50",
            num_groups=2,
            num_queries=12,
            d_model=16,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            dim_feedforward=16,
            encoder_dim_feedforward=16,
            backbone="conv:8-8-8-8",
            loss_points=32,
        ),
        augmentation=AugmentationConfig(jitter_size=64, copy_paste=0.5, eval_short_side=64, eval_max_size=80),
        output=output,
        report=False,
        pictures=0,
        track=(),
    )


@pytest.mark.parametrize("model", ["mask2former_r50", "conditional_detr_r50"])
def test_nuclei_are_trained_on_with_pasted_ones(shared_data, tmp_path, model):
    config = small_segmenter(_some(shared_data("nuclei"), tmp_path), tmp_path / "run")
    if model == "conditional_detr_r50":
        own = dict.fromkeys(("encoder_dim_feedforward", "loss_points"))
        config = replace(config, model=replace(config.model, model=model, backbone="conv:8-8-8", **own))
    optimization = replace(config.optimization, epochs=1, lr_drop=(1,), batch_size=2)
    config = replace(config, optimization=optimization)
    results = train(config)
    assert results["epochs"][0]["skipped_steps"] == 0
    assert "AP" in results["epochs"][0]["metrics"]
    train(replace(config, output=tmp_path / "again", data=replace(config.data, workers=0)))
    assert same(config.output, tmp_path / "again")
    assert from_yaml(CocoTrainingConfig, config.output / "config.yaml").augmentation.copy_paste == 0.5


def _some(folder, place):
    """The first images of a data set, under the same names."""
    (place / "annotations").mkdir()
    (place / "images").symlink_to(folder / "images")
    for part in ("train", "val"):
        content = json.loads((folder / "annotations" / f"instances_{part}.json").read_text())
        content["images"] = content["images"][:4]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        (place / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return place
