"""Settings and data that a run refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from groupdetr_fast.data import DataError
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.train import train


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


def test_graphs_of_detectors_of_masks_are_refused():
    with pytest.raises(ValueError, match="cuda_graphs are for detectors of boxes: leave it out for mask2former_r50"):
        CocoTrainingConfig().with_settings(model="mask2former_r50", cuda_graphs=1)


def test_random_weights_are_not_evaluated(config):
    with pytest.raises(ValueError, match="nothing to evaluate but random weights: give load"):
        evaluate_checkpoint(config)


def test_an_evaluation_is_no_training(config):
    with pytest.raises(ValueError, match="eval_only is not a training"):
        train(replace(config, eval_only=True))
