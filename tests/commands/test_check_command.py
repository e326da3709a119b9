"""``groupdetr check`` on the embedded digits, and with faults planted in them."""

import json
import re
import shutil

import pytest

from groupdetr_fast import cli
from groupdetr_fast.data import DigitsConfig, digits_dataset


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=20, val_images=20, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size).train_images.parent


def check(*arguments):
    cli.main(["check", *map(str, arguments)])


def test_a_sound_set_passes(digits, capsys):
    check(digits)
    text = capsys.readouterr().out
    assert "train: 20 images (0 without objects)" in text
    assert "val: 20 images" in text
    assert "images from 48 x 48 to 48 x 48 pixels" in text
    assert text.splitlines()[-1].startswith("no errors, ")
    check("--data-path", digits, "--no-decode")


def test_errors_give_exit_status_1_and_one_sentence_each(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "val.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"][:5]:
        entry["category_id"] = 77
    file.write_text(json.dumps(content))
    (tmp_path / "set" / "train" / "000002.png").unlink()
    shutil.copy(tmp_path / "set" / "train" / "000003.png", tmp_path / "set" / "val" / "000001.png")
    folder = tmp_path / "set"
    data = ["--train-images", folder / "train", "--train-annotations", folder / "annotations" / "train.json"]
    data += ["--val-images", folder / "val", "--val-annotations", file]
    with pytest.raises(SystemExit, match=r"error: the data set has 6 errors and \d+ warnings"):
        check(*data, "--limit", "3", "--num-queries=2")
    lines = capsys.readouterr().out.splitlines()
    assert any("image 2" in line and "000002.png does not exist" in line for line in lines)
    assert sum("category_id 77, which is not in the table" in line for line in lines) == 3
    assert "error: ... and 2 more like these" in lines
    assert "warning: image 1 of val is the same file as image 3 of train" in lines
    assert any("a group has 2 queries" in line for line in lines)


def test_the_part_to_test_on_is_checked_too(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "set")
    shutil.copytree(tmp_path / "set" / "val", tmp_path / "set" / "test")
    shutil.copy(tmp_path / "set" / "train" / "000003.png", tmp_path / "set" / "test" / "000001.png")
    content = json.loads((tmp_path / "set" / "annotations" / "val.json").read_text())
    content["annotations"][0]["category_id"] = 77
    (tmp_path / "set" / "annotations" / "test.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the data set has 1 error and"):
        check(tmp_path / "set")
    text = capsys.readouterr().out
    assert "test: 20 images" in text
    assert "which is not in the table" in text
    assert "warning: image 1 of test is the same file as image 3 of train" in text


def in_yolos_layout(digits, folder, test):
    """The digits with an object in each image, and an entry of that part; it begins as images without labels."""
    for part in ("train", "val", "test"):
        shutil.copytree(digits / ("train" if part == "train" else "val"), folder / "images" / part)
    for part in ("train", "val"):
        (folder / "labels" / part).mkdir(parents=True)
        for image in (folder / "images" / part).iterdir():
            (folder / "labels" / part / f"{image.stem}.txt").write_text("0 0.5 0.5 1 1\n")
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\ntest: {test}\nnames: [a]\n")


@pytest.mark.parametrize(
    ("test", "warning"),
    [
        ("images/test", "warning: test: without labels: not checked"),
        ("test-dev.txt", None),
        ("images/test/000001.png", r"warning: test: .*000001\.png cannot be read as a list of images .*: not checked"),
    ],
    ids=["unlabelled", "not downloaded", "binary"],
)
def test_a_part_to_test_on_in_yolos_layout_stops_no_training(digits, tmp_path, capsys, test, warning):
    in_yolos_layout(digits, tmp_path, test)
    (tmp_path / "test-dev.txt").write_text("./images/dev/1.png\n./images/dev/2.png\n")
    check(tmp_path)
    text = capsys.readouterr().out
    assert "train: 20 images" in text
    assert text.splitlines()[-1] == ("no errors, 1 warning" if warning else "no errors, 0 warnings")
    assert "test:" not in text if warning is None else re.search(f"^{warning}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("annotations", "folder", "warning"),
    [
        (None, "test", r'annotation file .*test\.json lacks the key "annotations"; .*'),
        ("of val", "elsewhere", "no folder test or images with the images"),
        ([], "test", "without labels"),
    ],
    ids=["no table", "no images", "unlabelled"],
)
def test_a_part_to_test_on_in_cocos_layout_stops_no_training(digits, tmp_path, capsys, annotations, folder, warning):
    shutil.copytree(digits, tmp_path / "set")
    shutil.copytree(tmp_path / "set" / "val", tmp_path / "set" / folder)
    content = json.loads((tmp_path / "set" / "annotations" / "val.json").read_text())
    if annotations != "of val":
        content["annotations"] = annotations
    content = {table: entries for table, entries in content.items() if entries is not None}
    (tmp_path / "set" / "annotations" / "test.json").write_text(json.dumps(content))
    check(tmp_path / "set")
    text = capsys.readouterr().out
    assert "val: 20 images" in text
    assert "test: 20" not in text
    assert re.search(rf"^warning: test: .*{warning}: not checked$", text, re.MULTILINE)


def test_names_do_not_act_on_the_terminal(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "set")
    for part in ("train", "val"):
        file = tmp_path / "set" / "annotations" / f"{part}.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = "\x1b]0;owned\x07\x1b[2J" + 1_000_000 * "x"
        content["categories"].append({"id": 99, "name": "\x1b[31m" + 1_000_000 * "y"})
        file.write_text(json.dumps(content))
    check(tmp_path / "set")
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"\x1b]0;owned\x07" in text
    assert len(text) < 4000


def test_what_training_refuses_is_an_error(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "val.json"
    content = json.loads(file.read_text())
    del content["categories"][0]["name"]
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="has 1 error and"):
        check(tmp_path / "set")
    assert 'categories[0] lacks the key "name"' in capsys.readouterr().out


def test_faults_of_labels_in_yolos_layout_are_listed(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "cache"))
    for part in ("train", "val"):
        shutil.copytree(digits / part, tmp_path / "set" / "images" / part)
        (tmp_path / "set" / "labels" / part).mkdir(parents=True)
    (tmp_path / "set" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a]\n")
    (tmp_path / "set" / "labels" / "train" / "000001.txt").write_text("0 0.5 0.5 1 1\n1 0.5 0.5 1 1\n0 0.5\n")
    (tmp_path / "set" / "labels" / "val" / "000001.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(SystemExit, match="has 2 errors"):
        check(tmp_path / "set")
    text = capsys.readouterr().out
    assert "000001.txt, line 2: class 1 is not among" in text
    assert "000001.txt, line 3: expected class cx cy width height" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "data folder nowhere does not exist"),
        (["a", "--data-path", "b"], "give the folder or data_path, not both"),
        ([], "give data_path, coco_path, or both train_images"),
    ],
)
def test_data_must_be_given(arguments, message):
    with pytest.raises(SystemExit, match=message):
        check(*arguments)
