"""Trainings that are measured step by step."""

import json
from dataclasses import replace

from groupdetr_fast.analysis.steps import trainer_of


def test_images_without_objects_are_left_out_here_too(training, tmp_path):
    content = json.loads(training.data.train_annotations.read_text())
    emptied = content["images"][0]["id"]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != emptied]
    (tmp_path / "some_empty.json").write_text(json.dumps(content))
    data = replace(training.data, train_annotations=tmp_path / "some_empty.json", filter_empty=True)
    loader = trainer_of(replace(training, data=data), tmp_path / "run").state.loader
    images = [image_id for batch in loader for image_id in batch.image_ids]
    assert sorted(images) == sorted(image["id"] for image in content["images"] if image["id"] != emptied)
