"""YOLO's layout; how images that EXIF turns look is judged by Pillow."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from groupdetr_fast.data import CocoDataset, DataError
from groupdetr_fast.data.yolo import read_yolo, yolo_as_coco


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    """A function that writes a data set of images and labels, {part/name: lines}. Returns its ``data.yaml``."""

    def write_files(labels, yaml="train: images/train\nval: images/val\nnames: [cat, dog]\n", size=(40, 20)):
        for name, lines in labels.items():
            image = tmp_path / "set" / "images" / f"{name}.png"
            label = tmp_path / "set" / "labels" / f"{name}.txt"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(image)
            if lines is not None:
                label.write_text("\n".join(lines) + "\n")
        (tmp_path / "set" / "data.yaml").write_text(yaml)
        return tmp_path / "set" / "data.yaml"

    return write_files


def test_boxes_and_polygons_become_coco(write):
    box, polygon = "1 0.5 0.5 0.5 0.5", "0 0.25 0.5 0.5 0.5 0.5 1.0"
    file = write({"train/b": [box, "", box, polygon], "train/deep/a": None, "val/c": []})
    folder, annotations = yolo_as_coco(file, "train")
    content = json.loads(annotations.read_text())
    assert folder == file.parent / "images" / "train"
    assert content["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert [image["file_name"] for image in content["images"]] == ["b.png", "deep/a.png"]
    first, second = content["annotations"]  # a repeated line counts once
    assert (first["category_id"], first["bbox"], first["area"]) == (1, [10, 5, 20, 10], 200)
    assert "segmentation" not in first
    assert (second["category_id"], second["bbox"]) == (0, [10, 10, 10, 10])
    assert second["segmentation"] == [[10, 10, 20, 10, 20, 20]]
    dataset = CocoDataset(folder, annotations)
    assert [len(dataset.ground_truth(index)["labels"]) for index in range(2)] == [2, 0]


def test_the_json_is_kept_until_a_file_changes(write, cache):
    file = write({"train/a": ["0 0.5 0.5 1 1"]})
    first = yolo_as_coco(file, "train")
    assert yolo_as_coco(file, "train") == first
    assert len(list(cache.iterdir())) == 1
    (file.parent / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 1 1 \n")
    second = yolo_as_coco(file, "train")
    assert second != first
    assert json.loads(second[1].read_text())["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize(
    "yaml",
    [
        "train: ../images/train\nval: ../images/val\nnames: {0: cat, 1: dog}\n",  # as Roboflow writes it
        "path: .\ntrain: [images/train]\nval: images/val\nnc: 2\n",
        "path: nowhere\ntrain: images/train\nnames: [cat, dog]\n",
        "train: list.txt\nnames: [cat, dog]\n",
    ],
)
def test_the_places_of_images_are_found(write, yaml):
    file = write({"train/a": ["0 0.5 0.5 1 1"]}, yaml)
    (file.parent / "list.txt").write_text("./images/train/a.png\n")
    content = read_yolo(file, "train").content
    assert [entry["bbox"] for entry in content["annotations"]] == [[0, 0, 40, 20]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_follow_images_that_are_stored_turned(tmp_path, write, orientation):
    """The labels are those of the upright image, which training sees."""
    file = write({"train/a": ["0 0.25 0.125 0.5 0.25"]})
    pixels = np.arange(40 * 20, dtype=np.int32).reshape(20, 40).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file.parent / "images" / "train" / "a.png", exif=exif)
    with Image.open(file.parent / "images" / "train" / "a.png") as stored:
        upright = np.array(ImageOps.exif_transpose(stored))
    height, width = upright.shape
    labelled = upright[: height // 4, : width // 2]
    folder, annotations = yolo_as_coco(file, "train")
    dataset = CocoDataset(folder, annotations)
    x1, y1, x2, y2 = (round(value) for value in dataset.ground_truth(0)["boxes"][0].tolist())
    found = dataset.image(0)[0, y1:y2, x1:x2].numpy()
    np.testing.assert_array_equal(found, labelled)


def test_all_faults_are_told_and_the_first_stops_a_training(write):
    lines = ["5 0.5 0.5 1 1", "0 0.5 0.5 1", "0 a b c d", "0.5 0.5 0.5 1 1", "0 nan 0.5 1 1", "1 0.5 0.5 1 1"]
    file = write({"train/a": lines, "train/b": []})
    (file.parent / "images" / "train" / "b.png").write_bytes(b"damaged")
    found = read_yolo(file, "train")
    assert len(found.content["annotations"]) == len(found.content["images"]) == 1
    expected = [
        "a.txt, line 1: class 5 is not among the 2 names",
        "a.txt, line 2: expected class cx cy width height",
        "a.txt, line 3: expected numbers, got '0 a b c d'",
        "a.txt, line 4: class 0.5 is not among",
        "a.txt, line 5: expected numbers",
        "b.png cannot be read",
    ]
    assert len(found.faults) == len(expected)
    for fault, text in zip(found.faults, expected, strict=True):
        assert text in fault
    with pytest.raises(DataError, match=r"a.txt, line 1: class 5 .* \(and 5 more: groupdetr check lists them\)"):
        yolo_as_coco(file, "train")


def test_images_none_of_which_has_a_label_are_a_fault(write):
    file = write({"train/a": None, "train/b": None, "val/c": []})
    message = r"no image of train has a label file; that of a.png is looked for at .*labels/train/a.txt"
    with pytest.raises(DataError, match=message):
        yolo_as_coco(file, "train")
    assert (read_yolo(file, "train").labelled, read_yolo(file, "val").labelled) == (False, True)
    assert read_yolo(file, "val").faults == []


def test_a_list_of_images_that_is_no_text_is_named(write):
    file = write({"train/a": []}, "train: images/train/a.png\nnames: [a]\n")
    with pytest.raises(DataError, match=r"a\.png cannot be read as a list of images"):
        read_yolo(file, "train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("- a\n", "must have the keys"),
        ("{", "cannot be read as yaml"),
        ("train: images/train\nnames: 7.5\n", "names must be a list"),
        ("[" * 5000, "nested too deeply"),
        ("train: images/train\nnames: [[a]]\n", "names must be texts"),
        ("names: [a]\n", "must say under train where the images are"),
        ("train: nowhere\nnames: [a]\n", "there is nothing at nowhere"),
        ("train: labels\nnames: [a]\n", "there are no images in labels"),
    ],
)
def test_wrong_settings_are_refused(write, yaml, message):
    file = write({"train/a": []}, yaml)
    with pytest.raises(DataError, match=message):
        read_yolo(file, "train")
