"""``groupdetr predict`` on a small detector with random weights."""

import importlib
import json
import re
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from small_checkpoint import CATEGORIES, SIZES, write_checkpoint

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.commands.predict import PredictCommand
from groupdetr_fast.commands.predict import command as predict_command
from groupdetr_fast.commands.predict.sources import find_sources, unlike_each_other
from groupdetr_fast.data import DataError
from groupdetr_fast.prediction import InferenceSettings, Options


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in {"a/1.png": (30, 40), "b/1.jpg": (50, 30), "b/2.jpg": (20, 20)}.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "b" / "notes.txt").touch()
    return tmp_path / "photos"


def run(*arguments):
    cli.main(["predict", *map(str, arguments)])


def test_results_of_files_folders_and_patterns(images, tmp_path, capsys):
    checkpoint, output = write_checkpoint(tmp_path), tmp_path / "out"
    run(
        checkpoint,
        images / "a" / "1.png",
        images / "b",
        f"{images}/**/*.png",
        "--score-threshold=0",
        "--output",
        output,
    )
    assert "in 3 images" in capsys.readouterr().out
    content = json.loads((output / "predictions.json").read_text())
    expected = [images / "a" / "1.png", images / "b" / "1.jpg", images / "b" / "2.jpg"]
    assert [entry["file_name"] for entry in content["images"]] == [str(path) for path in expected]
    assert content["categories"] == CATEGORIES
    found = gd.predict(gd.load_model(checkpoint), expected, score_threshold=0.0)
    by_image = COCO(str(output / "predictions.json")).imgToAnns
    for image_id, detection in enumerate(found, start=1):
        entries = by_image[image_id]
        names = {category["id"]: category["name"] for category in CATEGORIES}
        assert [names[entry["category_id"]] for entry in entries] == detection["class_names"]
        assert [entry["score"] for entry in entries] == pytest.approx(detection["scores"].tolist(), abs=1e-5)
        boxes = torch.tensor([entry["bbox"] for entry in entries])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, detection["boxes"], rtol=1e-4, atol=1e-3)
    pictures = {path.name: Image.open(path).size for path in (output / "images").iterdir()}
    assert pictures == {"1.jpg": (640, 480), "1_2.jpg": (384, 640), "2.jpg": (640, 640)}
    assert (output / "contact_sheet.png").stat().st_size > 1000


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("meta", 0)])
def test_memory_is_kept_from_image_to_image_on_a_cpu(device, kept, images, tmp_path, monkeypatch):
    """A model on another device is made up here, and where it lies is asked before anything is detected."""
    keep = mock.Mock()
    monkeypatch.setattr(predict_command, "keep_freed_memory", keep)
    if device == "meta":
        load = predict_command.load_model
        monkeypatch.setattr(predict_command, "load_model", lambda *args, **options: load(*args, **options).to("meta"))
        monkeypatch.setattr(predict_command, "Predictor", mock.Mock(side_effect=DataError("nothing is detected")))
        with pytest.raises(SystemExit, match="nothing is detected"):
            run(write_checkpoint(tmp_path), images / "b", "--output", tmp_path / "out")
    else:
        run(write_checkpoint(tmp_path), images / "b", "--device", device, "--output", tmp_path / "out")
    assert keep.call_count == kept


def test_unreadable_files_are_named_and_the_rest_done(images, tmp_path):
    (images / "b" / "1.jpg").write_bytes(b"damaged")
    output = tmp_path / "out"
    message = (
        r"error: 2 of 4 images cannot be read: \S*none.png \(which does not exist\), \S*1.jpg; the others are done"
    )
    with pytest.raises(SystemExit, match=message):
        run(write_checkpoint(tmp_path), images / "none.png", images / "a", images / "b", "--output", output)
    content = json.loads((output / "predictions.json").read_text())
    assert [entry["id"] for entry in content["images"]] == [1, 2]
    assert len(list((output / "images").iterdir())) == 2


@pytest.mark.parametrize("names", [["nowhere.jpg"], ["nowhere/"], ["nowhere", "neither.png"]])
def test_paths_of_which_none_exists_are_called_that(tmp_path, names):
    """Before anything is done; the same for the checkpoint."""
    output = tmp_path / "out"
    listed = ", ".join(str(tmp_path / name) for name in names)
    with pytest.raises(SystemExit, match=f"^error: there is nothing at {listed}$"):
        run(write_checkpoint(tmp_path), *(tmp_path / name for name in names), "--output", output)
    with pytest.raises(SystemExit, match=r"^error: checkpoint: there is nothing at nowhere\.pth$"):
        run("nowhere.pth", write_checkpoint(tmp_path), "--output", output)
    assert not output.exists()


def test_an_image_beyond_all_bounds_does_not_end_the_command(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    Image.new("RGB", (100, 100)).save(images / "a" / "0.png")
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"error: 1 of 2 images cannot be read: .*0.png; the others are done"):
        run(write_checkpoint(tmp_path), images / "a", "--output", output)
    assert [path.name for path in (output / "images").iterdir()] == ["1.jpg"]


def test_pictures_of_large_images_are_small_and_their_boxes_in_place(images, tmp_path):
    Image.new("RGB", (3000, 1500)).save(images / "a" / "large.png")
    output = tmp_path / "out"
    run(write_checkpoint(tmp_path), images / "a" / "large.png", "--score-threshold=0", "--output", output)
    with Image.open(output / "images" / "large.jpg") as picture:
        assert picture.size == (2000, 1000)
    content = json.loads((output / "predictions.json").read_text())
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (3000, 1500)
    found = gd.predict(gd.load_model(tmp_path / "model.safetensors"), images / "a" / "large.png", score_threshold=0.0)
    boxes = torch.tensor([entry["bbox"] for entry in content["annotations"]])
    torch.testing.assert_close(boxes[:, 2:], found["boxes"][:, 2:] - found["boxes"][:, :2], rtol=1e-4, atol=1e-2)


def test_masks_and_no_pictures(images, tmp_path):
    settings = {"backbone": "conv:8-16-16-16", "encoder_dim_feedforward": 16}
    checkpoint, output = write_checkpoint(tmp_path, "mask2former_r50", **settings), tmp_path / "out"
    flags = ["--score-threshold=0", "--top-k=3", "--no-annotated", "--contact-sheet=1", "--output", output]
    run(checkpoint, images / "b", *flags)
    content = json.loads((output / "predictions.json").read_text())
    coco = COCO(str(output / "predictions.json"))
    assert len(content["annotations"]) == 6
    for entry in content["annotations"]:
        assert entry["area"] == coco.annToMask(entry).sum()
    assert not (output / "images").exists()


@pytest.mark.parametrize(
    ("flags", "pictures", "thumbnails"),
    [
        (["--contact-sheet=2"], 10, 2),
        (["--contact-sheet=0"], 10, 0),
        (["--contact-sheet=2", "--no-annotated"], 0, 10 + 2),
        (["--contact-sheet=0", "--no-annotated"], 0, 0),
    ],
)
def test_no_more_is_reduced_than_is_shown(tmp_path, monkeypatch, flags, pictures, thumbnails):
    module = importlib.import_module("groupdetr_fast.commands.predict.images")
    (tmp_path / "in").mkdir()
    for number in range(10):
        Image.new("RGB", (30, 30)).save(tmp_path / "in" / f"{number}.png")
    sides, reduce_image = [], module.reduce_image

    def counted(image, side):
        sides.append(side)
        return reduce_image(image, side)

    monkeypatch.setattr(module, "reduce_image", counted)
    run(write_checkpoint(tmp_path), tmp_path / "in", *flags, "--output", tmp_path / "out")
    assert (sides.count(module.PICTURE_PIXELS), sides.count(module.CELL_PIXELS)) == (pictures, thumbnails)
    assert (tmp_path / "out" / "contact_sheet.png").exists() == ("--contact-sheet=2" in flags)


def test_the_options_of_predict_are_flags_of_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    flags = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
    names = {each.name.replace("_", "-") for each in fields(Options)}
    assert names - flags == {"settings"}  # which the checkpoint says
    assert PredictCommand()._options(InferenceSettings()) == Options(settings=InferenceSettings())


def test_classes_of_other_checkpoints_are_named_by_a_coco_file(images, tmp_path):
    path = write_checkpoint(tmp_path)
    torch.save(gd.load_model(path).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(SystemExit, match="does not say which detector it is of"):
        run(tmp_path / "bare.pth", images / "a")
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": [], "categories": CATEGORIES[::-1]}))
    output = tmp_path / "out"
    run(path, images / "a", "--categories", tmp_path / "c.json", "--labels=contiguous", "--output", output)
    assert json.loads((output / "predictions.json").read_text())["categories"] == CATEGORIES
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 3}]}))
    with pytest.raises(SystemExit, match="has a category without the key 'name'"):
        run(path, images / "a", "--categories", tmp_path / "c.json")


def test_images_are_found(images, tmp_path):
    assert find_sources([str(images / "b")]).images == (images / "b" / "1.jpg", images / "b" / "2.jpg")
    assert find_sources([f"{images}/**/1.*", str(images / "x.jpg")]).images == (
        images / "a" / "1.png",
        images / "b" / "1.jpg",
        images / "x.jpg",
    )
    assert find_sources([f"{images}/**/1.*"], besides=images / "b").images == (images / "a" / "1.png",)
    with pytest.raises(DataError, match=r"no videos: those of the folders in it are \".*") as refused:
        find_sources([str(images)])
    assert len(find_sources([str(refused.value).split('"')[1]]).images) == 3
    (images / "empty").mkdir()
    with pytest.raises(DataError, match=r"there are no images in .*empty, and no videos$"):
        find_sources([str(images / "empty")])
    with pytest.raises(DataError, match="name the images"):
        find_sources([])


def test_no_two_files_of_results_have_one_name():
    assert unlike_each_other([]) == []
    assert unlike_each_other(["a", "b", "a", "a_2", "a", "a_2"]) == ["a", "b", "a_2", "a_2_2", "a_3", "a_2_3"]
    assert unlike_each_other(["a_2", "a", "a"]) == ["a_2", "a", "a_3"]
    assert len(set(unlike_each_other(["a"] * 50_000))) == 50_000  # which takes minutes if each counts from 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--device=tpu", "device 'tpu' cannot be used here"),
        ("--top-k=0", "top_k must be at least 1"),
        ("--batch-size=0", "batch_size must be at least 1"),
        ("--score-threshold=nan", "score_threshold must be in"),
        ("--score-threshold=2", "score_threshold must be in"),
        ("--contact-sheet=201", "contact_sheet must be 0 to 200, got 201"),
        ("--contact-sheet=-1", "contact_sheet must be 0 to 200, got -1"),
        ("--eval-short-side=2", "eval_short_side must be at least 8 pixels"),
    ],
)
def test_wrong_settings_end_in_a_sentence(images, tmp_path, flag, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run(write_checkpoint(tmp_path), images / "a", flag, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_of_an_earlier_prediction_go_and_nothing_else(images, tmp_path):
    checkpoint, output = write_checkpoint(tmp_path), tmp_path / "out"
    run(checkpoint, images / "b", "--output", output)
    Image.new("RGB", (8, 8)).save(output / "images" / "mine.jpg")
    content = json.loads((output / "predictions.json").read_text())
    assert [entry["picture"] for entry in content["images"]] == ["images/1.jpg", "images/2.jpg"]
    (tmp_path / "kept.jpg").touch()
    content["images"] += [{"picture": "images/../../kept.jpg"}, {"picture": "../kept.jpg"}, {"picture": 7}, None]
    (output / "predictions.json").write_text(json.dumps(content))
    run(checkpoint, images / "a", "--contact-sheet=0", "--output", output)
    assert sorted(path.name for path in (output / "images").iterdir()) == ["1.jpg", "mine.jpg"]
    assert not (output / "contact_sheet.png").exists()
    assert (tmp_path / "kept.jpg").exists()


def test_every_command_takes_the_folder_of_a_run(images, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "best"
    folder.mkdir(parents=True)
    write_checkpoint(folder)
    for command in (
        ["predict", tmp_path / "run", images / "a", "--output", tmp_path / "out"],
        ["export", tmp_path / "run", "--output", tmp_path / "a.pt2"],
        ["analyze", "reference-points", "--checkpoint", tmp_path / "run", "--output", tmp_path / "analysis"],
    ):
        cli.main([str(argument) for argument in command])
    for written in ("out/predictions.json", "a.pt2", "analysis/reference_points.csv"):
        assert (tmp_path / written).stat().st_size > 0


def test_sizes_are_given_where_the_checkpoint_does_not_say_them(images, tmp_path):
    path = write_checkpoint(tmp_path)
    torch.save(gd.load_model(path).state_dict(), tmp_path / "bare.pth")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    sizes += ["--model=conditional_detr_r50", "--num-classes=3", "--dim-feedforward=16", "--backbone=conv:8-16"]
    common = ["--score-threshold=0", "--eval-short-side=32", "--eval-max-size=1333"]
    found = []
    for checkpoint, flags in ((path, []), (tmp_path / "bare.pth", sizes)):
        output = tmp_path / "out"
        run(checkpoint, images / "a", *common, *flags, "--output", output)
        content = json.loads((output / "predictions.json").read_text())
        found.append([(entry["score"], entry["bbox"]) for entry in content["annotations"]])
    assert found[0] == found[1]
    assert found[0]
    with pytest.raises(SystemExit, match=r"has shape|does not fit"):
        run(tmp_path / "bare.pth", images / "a", *sizes, "--d-model=32", "--output", tmp_path / "other")


@pytest.mark.parametrize("name", ["images/photo.jpg", "videos/clip.mp4", "contact_sheet.png"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_results_would_replace_is_refused(tmp_path, monkeypatch, name, linked):
    """Before anything is read or written, however it is named."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    beside = path.with_suffix(".json")
    beside.write_bytes(b"also mine")
    output = "."
    if linked:
        (tmp_path / "link").symlink_to(tmp_path)
        output = "link"
    message = f"^error: {name} lies where results are written: give another output than {output}$"
    with pytest.raises(SystemExit, match=message):
        run("nowhere.pth", name, "--output", output)
    assert path.read_bytes() == b"mine"
    assert beside.read_bytes() == b"also mine"
    assert not (tmp_path / "predictions.json").exists()
