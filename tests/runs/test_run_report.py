"""The page about a run, from detections of known quality."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from pycocotools import mask as rle

from groupdetr_fast.data import DigitsConfig, digits_dataset
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.evaluation.coco import evaluate_coco
from groupdetr_fast.prediction import InferenceSettings
from groupdetr_fast.prediction.selection import Selection
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.loaders import evaluation_set
from groupdetr_fast.runs.report import write_report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps the cells of tables and the sources of pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.pictures = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


@pytest.fixture
def run(tmp_path):
    """A run on digits whose detections are the objects of all images but the first, and a wrong one."""
    size = DigitsConfig(image_size=48, train_images=1, val_images=5, max_objects=3, min_digit=12, max_digit=24)
    digits = digits_dataset(tmp_path / "digits", config=size)
    content = json.loads(digits.val_annotations.read_text())
    content["categories"][0]["name"] = "<b>zero & more"
    digits.val_annotations.write_text(json.dumps(content))
    config = CocoTrainingConfig(
        data=DataConfig(val_images=digits.val_images, val_annotations=digits.val_annotations),
        model=ModelConfig(num_groups=2),
        output=tmp_path / "run",
    )
    first = content["images"][0]["id"]
    results = [
        {name: entry[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in content["annotations"]
        if entry["image_id"] != first
    ]
    wrong = content["categories"][1]["id"]
    results.append({"image_id": first, "category_id": wrong, "bbox": [0, 0, 2, 2], "score": 0.95})
    config.output.mkdir()
    (config.output / "detections.json").write_text(json.dumps(results))
    return config, evaluation_set(config), evaluate_coco(content, results), first


def test_the_page_stands_alone_and_says_what_is_wrong(run):
    config, dataset, metrics, first = run
    text = write_report(config, dataset, metrics).read_text()
    page = Page(text)
    assert "<b>" not in text
    assert "&lt;b&gt;zero" in text
    assert page.cells[0] == f"{metrics['AP']:.3f}"
    assert str(first) in page.cells[page.cells.index("missed") :]  # the image without detections is the worst
    assert f"image_id: {first}" not in text
    assert len(page.pictures) == 4  # curves of a training aside
    for source in page.pictures:
        kind, content = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size > (100, 100)
    assert config.as_yaml().splitlines()[0] in text
    assert "groupdetr train" not in text


def test_the_page_of_a_training_has_its_curves(run):
    config, dataset, metrics, _ = run
    history = [
        {"epoch": 1, "seconds": 30.0, "train": {"loss": 9.0}},
        {"epoch": 2, "seconds": 30.0, "train": {"loss": 8.0}, "metrics": metrics},
    ]
    text = write_report(config, dataset, metrics, history).read_text()
    assert len(Page(text).pictures) == 5
    assert f"2 epochs in 1.0 minutes of training; best AP {metrics['AP']:.3f} in epoch 2" in text
    assert f"groupdetr train --config {config.output / 'config.yaml'}" in text


def test_of_equal_epochs_the_page_names_the_one_that_is_kept(run):
    config, dataset, metrics, _ = run
    history = [{"epoch": epoch, "seconds": 30.0, "train": {"loss": 9.0}, "metrics": metrics} for epoch in (1, 2)]
    text = write_report(config, dataset, metrics, history).read_text()
    assert f"best AP {metrics['AP']:.3f} in epoch 1." in text


def test_prediction_takes_the_thresholds_that_are_written(run):
    """Of classes that were found 0.9, the score of all that is right; null for others, which have the general one."""
    config, dataset, metrics, _ = run
    write_report(config, dataset, metrics)
    path = config.output / "class_thresholds.json"
    thresholds = json.loads(path.read_text())
    names = [category["name"] for category in dataset.categories]
    assert list(thresholds) == names
    assert set(thresholds.values()) == {0.9, None}
    settings = InferenceSettings().with_categories(dataset.categories, "contiguous")
    selected = Selection.of(settings, len(names), 0.5, None, path).for_postprocess(len(names))
    assert selected.tolist() == pytest.approx([thresholds[name] or 0.5 for name in names])


def test_the_page_of_masks(run):
    config, _, _, first = run
    config = replace(config, model=replace(config.model, model="mask2former_r50"))
    content = json.loads(config.data.val_annotations.read_text())
    results = []
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        if entry["image_id"] != first:
            mask = rle.merge(rle.frPyObjects(entry["segmentation"], 48, 48))
            mask["counts"] = mask["counts"].decode("ascii")
            detection = {name: entry[name] for name in ("image_id", "category_id", "bbox")}
            results.append({**detection, "segmentation": mask, "score": 0.9})
    config.data.val_annotations.write_text(json.dumps(content))
    dataset = evaluation_set(config)
    (config.output / "detections.json").write_text(json.dumps(results))
    metrics = evaluate_coco(content, results, "segm")
    assert len(Page(write_report(config, dataset, metrics).read_text()).pictures) == 4


def test_no_detection_at_all(run):
    config, dataset, _, _ = run
    (config.output / "detections.json").write_text("[]")
    metrics = evaluate_coco(json.loads(config.data.val_annotations.read_text()), [])
    text = write_report(config, dataset, metrics).read_text()
    assert re.search(r"missed</td><td>[1-9]", text)


def test_a_page_that_cannot_be_written_costs_nothing_else(run, caplog):
    config, dataset, metrics, _ = run
    for path in config.data.val_images.iterdir():
        path.unlink()
    assert write_report(config, dataset, metrics) is None
    assert "index.html was not written" in caplog.text
