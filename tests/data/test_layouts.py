import pytest
from PIL import Image

from groupdetr_fast.data import DataError, find_data


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("files", "images", "annotations"),
    [
        (["annotations/instances_val2017.json", "val2017/a.jpg"], "val2017", "annotations/instances_val2017.json"),
        (["annotations/instances_val.json", "images/a.jpg"], "images", "annotations/instances_val.json"),
        (
            ["annotations/instances_val2014.json", "images/val2014/a"],
            "images/val2014",
            "annotations/instances_val2014.json",
        ),
        (["annotations/val.json", "val/a.jpg", "images/a.jpg"], "val", "annotations/val.json"),
        (["valid/_annotations.coco.json"], "valid", "valid/_annotations.coco.json"),
        (["val/_annotations.coco.json"], "val", "val/_annotations.coco.json"),
    ],
)
def test_layouts_of_coco_files(tmp_path, files, images, annotations):
    touch(tmp_path, *files)
    assert find_data(tmp_path, "val") == (tmp_path / images, tmp_path / annotations)


def test_yolo_by_folder_and_by_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "cache"))
    touch(tmp_path, "images/train/a.png", "labels/train/a.txt")
    Image.new("L", (4, 4)).save(tmp_path / "images/train/a.png")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [a]\n")
    images, annotations = find_data(tmp_path, "train")
    assert images == tmp_path / "images" / "train"
    assert annotations.parent.parent == tmp_path / "cache"
    assert find_data(tmp_path / "data.yaml", "train") == (images, annotations)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no val part in a known layout"),
        (["train/_annotations.coco.json"], "no val part in a known layout"),
        (["annotations/instances_val2017.json"], "no folder val2017 or images"),
        (["annotations/instances_val2014.json", "annotations/instances_val2017.json"], "several files for val"),
    ],
)
def test_what_is_missing_is_said(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        find_data(tmp_path, "val")


def test_a_missing_folder_is_named():
    with pytest.raises(DataError, match="data folder nowhere does not exist"):
        find_data("nowhere", "val")
