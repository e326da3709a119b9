import pytest
from PIL import Image

from groupdetr_fast.data import DataError, find_data
from groupdetr_fast.data.config import DataPaths
from groupdetr_fast.data.layouts import has_part


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
    "files", [["test/_annotations.coco.json"], ["annotations/instances_test.json", "test/a.jpg"]], ids=["own", "coco"]
)
def test_the_part_to_test_on_takes_the_place_of_val(tmp_path, files):
    touch(tmp_path, *files)
    data = DataPaths(data_path=tmp_path)
    assert data.evaluated_on("val") is data
    assert data.evaluated_on("test").val_paths() == (tmp_path / "test", tmp_path / files[0])
    assert has_part(tmp_path, "test")
    assert not has_part(tmp_path, "val")


def test_a_part_to_test_on_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no test part in a known layout"):
        DataPaths(data_path=tmp_path).evaluated_on("test")
    with pytest.raises(DataError, match="part of data_path; name the files of other data by val_images"):
        DataPaths(coco_path=tmp_path).evaluated_on("test")
    touch(tmp_path, "test/_annotations.coco.json")
    with pytest.raises(DataError, match=r"give data_path, coco_path, or the four .*: only one"):
        DataPaths(data_path=tmp_path, val_images=tmp_path, val_annotations=tmp_path / "a.json").evaluated_on("test")
    with pytest.raises(ValueError, match='split must be "val" or "test", got \'train\''):
        DataPaths(data_path=tmp_path).evaluated_on("train")


def test_a_part_that_data_yaml_names_in_vain_is_none(tmp_path):
    """As exports of Roboflow have it that were made without test images."""
    touch(tmp_path, "images/a.png")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\ntest: ../test/images\nnames: [a]\n")
    assert has_part(tmp_path, "val")
    assert not has_part(tmp_path, "test")


def test_a_list_of_images_is_a_part_if_any_of_them_is_there(tmp_path):
    """COCO as Ultralytics has it names the images of test-dev, which few download."""
    touch(tmp_path, "images/a.png")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\ntest: test.txt\nnames: [a]\n")
    (tmp_path / "test.txt").write_text("./test/a.png\n./test/b.png\n")
    assert not has_part(tmp_path, "test")
    touch(tmp_path, "test/b.png")
    assert has_part(tmp_path, "test")


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


def test_a_missing_folder_is_named(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(DataError, match=r"train.json is a file: give the folder of the data set, or its data.yaml"):
        find_data(tmp_path / "train.json", "val")
    with pytest.raises(DataError, match="data folder nowhere does not exist"):
        find_data("nowhere", "val")
