"""Settings and data that a run refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from groupdetr_fast.data import AugmentationConfig, DataError
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.find_rate import find_rate
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.config import OptimizationConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": None}, "give data_path, coco_path, or both val_images and val_annotations"),
        ({"train_annotations": None}, "give data_path, coco_path, or both train_images and train_annotations"),
        ({"coco_path": Path("coco")}, "only one"),
        ({"data_path": Path("set")}, "only one"),
        ({"train_images": Path("missing")}, "image folder missing does not exist"),
    ],
)
def test_wrong_data_settings_are_refused(config, change, message):
    with pytest.raises(DataError, match=message):
        train(replace(config, data=replace(config.data, **change)))


def test_different_category_tables_are_refused(config, digits, tmp_path):
    content = json.loads(digits.train_annotations.read_text())
    content["categories"].append({"id": 77, "name": "extra"})
    (tmp_path / "more.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"different categories \(category 77, 'extra', is in the first and not"):
        train(replace(config, data=replace(config.data, train_annotations=tmp_path / "more.json")))


@pytest.mark.parametrize("part", ["train", "val"])
def test_data_without_objects_are_refused(config, tmp_path, part):
    content = json.loads(getattr(config.data, f"{part}_annotations").read_text()) | {"annotations": []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"empty\.json has no object that can be used; groupdetr check says why"):
        train(replace(config, data=replace(config.data, **{f"{part}_annotations": tmp_path / "empty.json"})))


def test_categories_of_other_names_are_refused(config, digits, tmp_path):
    content = json.loads(digits.val_annotations.read_text())
    content["categories"][3]["name"] = "another"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError,
        match=r"val.json have different categories \(category 4 is '3' in the first and 'another' in the second\): ",
    ):
        train(replace(config, data=replace(config.data, val_annotations=tmp_path / "val.json")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping": -1}, "early_stopping must not be"),
        ({"evaluate_every": 0}, "evaluate_every must be at least"),
    ],
)
def test_wrong_settings_of_a_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CocoTrainingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1.0}, "epochs must be an integer, got 1.0"),
        ({"num_groups": 3.0}, "num_groups must be an integer, got 3.0"),
        ({"cuda_graphs": True}, "cuda_graphs must be an integer, got True"),
        ({"batch_size": "4"}, "batch_size must be an integer or auto, got '4'"),
        ({"lr": 10**400}, "lr must be a number, got 100000000000000000...0000000000000000000"),
        ({"num_queries": "many"}, "num_queries must be an integer or None, got 'many'"),
        ({"lr": "1e-4"}, "lr must be a number, got '1e-4'"),
        ({"resume": 1}, "resume must be True or False, got 1"),
        ({"load": 7}, "load must be a path or None, got 7"),
        ({"workers": 2.0}, "workers must be an integer or None, got 2.0"),
        ({"precision": "fp8"}, "precision must be one of no, bf16, fp16 or None, got 'fp8'"),
        ({"track": "wandb"}, "track must be a list, each entry one of tensorboard, .*, none, got 'wandb'"),
        ({"freeze": "backbone"}, "freeze must be a list, each entry a text, got 'backbone'"),
        ({"short_sides": (480, 512.0)}, "each entry of short_sides must be an integer, got 512.0"),
        ({"jitter_scale": (0.1,)}, r"jitter_scale must be a list of length 2, each entry a number, got \(0.1,\)"),
    ],
)
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        CocoTrainingConfig().with_settings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"num_groups": 0, "model": "transformers:some/model"}, "num_groups must be at least 1, got 0"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"d_model": -8}, "d_model must be a multiple of 4 and of num_heads=8, got -8"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"d_model": 36}, "d_model must be a multiple of 4 and of num_heads=8, got 36"),
        ({"encoder_layers": -1}, "encoder_layers must not be negative, got -1"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"frozen_stages": -1}, "frozen_stages must not be negative, got -1"),
        ({"backbone_stages": 0}, "backbone_stages must be at least 1, got 0"),
        ({"l1_loss": -1}, "l1_loss must not be negative and must be finite, got -1.0"),
        ({"loss_points": 0, "model": "mask2former_r50"}, "loss_points must be at least 1, got 0"),
        ({"loss_points": 9}, "conditional_detr_r50 has no setting 'loss_points'; it has .*"),
        ({"positives": 0}, "positives must be at least 1, got 0"),
        ({"positives": -1}, "positives must be at least 1, got -1"),
        ({"positives": 0, "model": "transformers:some/model"}, "positives is not for models of transformers: .*"),
        ({"positives": 2, "assignment": "one_to_one"}, "assignment .*one_to_one.* one query, got positives=2"),
        ({"assignment": "one_to_many", "model": "mask2former_r50"}, "Mask2FormerConfig is trained with .* alone"),
    ],
)
def test_settings_out_of_bounds_are_refused_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        CocoTrainingConfig().with_settings(**settings)


def test_settings_as_people_give_them_in_python_get_their_types():
    run = CocoTrainingConfig().with_settings(
        lr=1,
        backbone_lr=np.float64(1e-5),
        epochs=np.int64(3),
        lr_drop=[2],
        freeze=["backbone"],
        image_mean=(0, 0, 1),
        tf32=np.bool_(False),
        output="runs/x",
        backbone_weights=Path("weights.pth"),
        num_queries=None,
    )
    optimization = OptimizationConfig(
        lr=1.0, backbone_lr=1e-5, epochs=3, lr_drop=(2.0,), freeze=("backbone",), tf32=False
    )
    expected = CocoTrainingConfig(
        model=ModelConfig(backbone_weights="weights.pth"),
        augmentation=AugmentationConfig(image_mean=(0.0, 0.0, 1.0)),
        optimization=optimization,
        output=Path("runs/x"),
    )
    assert repr(run) == repr(expected)  # 1 equals 1.0 and has another text


@pytest.mark.parametrize("begin", [train, find_rate], ids=["train", "find_rate"])
def test_what_devices_or_launchers_refuse_leaves_no_folder(config, begin, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    half = replace(config, optimization=replace(config.optimization, precision="fp16"))
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        begin(half)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="precision is fp16 in this run and bf16 for accelerate launch"):
        begin(half)
    assert not config.output.exists()


def test_graphs_of_detectors_of_masks_are_refused():
    with pytest.raises(ValueError, match="cuda_graphs are for detectors of boxes: leave it out for mask2former_r50"):
        CocoTrainingConfig().with_settings(model="mask2former_r50", cuda_graphs=1)


def test_random_weights_are_not_evaluated(config):
    with pytest.raises(ValueError, match="nothing to evaluate but random weights: give load"):
        evaluate_checkpoint(config)


def test_an_evaluation_is_no_training(config):
    with pytest.raises(ValueError, match="eval_only is not a training"):
        train(replace(config, eval_only=True))
