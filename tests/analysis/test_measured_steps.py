"""Trainings that are measured step by step."""

import json
from dataclasses import replace

import yaml

from groupdetr_fast.analysis.steps import train_and_measure
from groupdetr_fast.runs.trainer import trainer_of


def test_images_without_objects_are_left_out_here_too(training, tmp_path):
    content = json.loads(training.data.train_annotations.read_text())
    emptied = content["images"][0]["id"]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != emptied]
    (tmp_path / "some_empty.json").write_text(json.dumps(content))
    data = replace(training.data, train_annotations=tmp_path / "some_empty.json", filter_empty=True)
    loader = trainer_of(replace(training, data=data)).state.loader
    images = [image_id for batch in loader for image_id in batch.image_ids]
    assert sorted(images) == sorted(image["id"] for image in content["images"] if image["id"] != emptied)


def test_weights_of_classes_count_where_steps_are_measured(training, tmp_path):
    names = [each["name"] for each in json.loads(training.data.train_annotations.read_text())["categories"]]
    (tmp_path / "weights.yaml").write_text(yaml.safe_dump({names[1]: 3.0}))
    weighted = replace(training, class_weights=str(tmp_path / "weights.yaml"))

    def weights(model, criterion, held):
        return {"weights": criterion.class_weights.tolist()}

    limits = {"steps": 0, "every": 1, "batches": 1}
    (row,) = train_and_measure(weighted, weights, **limits)
    assert row["weights"] == [3.0 if name == names[1] else 1.0 for name in names]
