"""Measurements at the size of COCO, with the thousandth part of everything."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from cpu import coco_size
from cpu.coco_like import CATEGORY_IDS, TRAIN, VAL, _picture, coco_like
from groupdetr_fast.data import CocoDataset, find_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("coco_size")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    Image.effect_noise((320, 240), 50).convert("RGB").save(folder / "a.jpg")
    return folder


@pytest.fixture(scope="module")
def data(folder, photographs):
    return coco_like(folder, photographs, reduce=1000)


def test_the_data_have_the_shape_of_coco(data):
    for part, shape in (("train", TRAIN.reduced(1000)), ("val", VAL.reduced(1000))):
        images, annotations = find_data(data, part)
        content = json.loads(annotations.read_text())
        crowds = [entry for entry in content["annotations"] if entry["iscrowd"]]
        assert (len(content["images"]), len(content["annotations"]), len(crowds)) == (
            shape.images,
            shape.objects,
            shape.crowds,
        )
        assert len({entry["image_id"] for entry in content["annotations"]}) == shape.images - shape.empty
        dataset = CocoDataset(images, annotations, masks=True)
        assert dataset.num_objects == shape.objects - shape.crowds
        assert [category["id"] for category in dataset.categories] == CATEGORY_IDS
        assert dataset.image(0).shape == (3, 480, 640)
        truth = dataset.ground_truth(dataset.indices_with_objects()[0])
        assert truth["masks"].flatten(1).any(1).all()
    assert len(CATEGORY_IDS) == 80


def test_the_same_data_are_made_again(data, tmp_path, photographs):
    again = coco_like(tmp_path, photographs, reduce=1000)
    for name in ("annotations/instances_train2017.json", "images/000000000005.jpg"):
        assert (again / name).read_bytes() == (data / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", coco_size.MEASUREMENTS)
def test_every_measurement_appends_rows(data, folder, name):
    rows = list(coco_size.measure(name, data, folder / "cache", 1000))
    assert len(rows) >= len(coco_size.MEASUREMENTS[name])
    for row in rows:
        assert set(row) == set(coco_size.COLUMNS)
        assert row["count"] > 0
        assert row["seconds"] > 0
        coco_size.append_row(row, folder / "rows.csv")
    written = list(csv.DictReader((folder / "rows.csv").open()))
    assert [row["case"] for row in written[-len(rows) :]] == [row["case"] for row in rows]


def test_generated_pictures_have_many_colours_and_smooth_regions():
    pixels = np.asarray(_picture(np.random.default_rng(0))).astype(float)
    assert pixels.shape == (480, 640, 3)
    assert pixels.std() > 30
    assert np.abs(np.diff(pixels, axis=1)).mean() < 10
