"""The command ``groupdetr eval``."""

import json
import re
import shutil

import pytest

from groupdetr_fast import cli
from groupdetr_fast.data import DigitsConfig, digits_dataset


def test_a_trained_checkpoint_is_evaluated_without_saying_its_sizes(tmp_path, capsys):
    """And without the files it was trained on: the same numbers as at the end of the training."""
    size = DigitsConfig(image_size=48, train_images=6, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    digits = digits_dataset(tmp_path / "digits", config=size)
    sizes = ["--num-queries=5", "--d-model=32", "--num-heads=2", "--encoder-layers=1", "--decoder-layers=1"]
    sizes += ["--dim-feedforward=32", "--backbone=conv:8-16", "--num-groups=2", "--eval-short-side=48"]
    val = ["--val-images", digits.val_images, "--val-annotations", digits.val_annotations, "--workers=0"]
    data = ["--train-images", digits.train_images, "--train-annotations", digits.train_annotations, *val]
    short = ["--short-sides", "48", "--crop=0", "--epochs=1", "--lr=1e-2", "--output", tmp_path / "run"]
    cli.main([str(argument) for argument in ["train", *data, *sizes, *short]])
    captured = capsys.readouterr()
    trained = captured.out
    assert "loss nan" not in captured.out + captured.err

    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_0001"
    assert f"report: {tmp_path / 'run' / 'index.html'}" in trained
    assert "1 epochs in" in (tmp_path / "run" / "index.html").read_text()
    evaluation = [checkpoint, "--output", tmp_path / "eval", "--pictures=0", "--no-report"]
    cli.main([str(argument) for argument in ["eval", *evaluation, *val]])
    table = re.compile(r"^.*Average.*$", re.MULTILINE)
    assert len(table.findall(trained)) >= 6
    assert table.findall(capsys.readouterr().out) == table.findall(trained)
    first, second = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("run", "eval"))
    assert first == second
    assert len(first) > 0

    cli.main([str(argument) for argument in ["eval", tmp_path / "run", "--output", tmp_path / "again", *val]])
    text = capsys.readouterr().out
    assert table.findall(text) == table.findall(trained)
    assert "epochs in" not in (tmp_path / "again" / "index.html").read_text()
    assert not (tmp_path / "eval" / "index.html").exists()
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]
    assert metrics == rows[-1]["metrics"]
    by_category = re.search(r"AP by category: (.*)", text)[1]
    expected = {f"{name} {ap:.3f}" for name, ap in metrics["per_category"].items() if ap is not None}
    assert set(by_category.split(", ")) == expected

    own = [
        "--config",
        tmp_path / "run" / "config.yaml",
        "--eval-only",
        "--load",
        tmp_path / "run" / "checkpoints" / "best",
    ]
    cli.main([str(argument) for argument in ["train", *own]])
    assert table.findall(capsys.readouterr().out) == table.findall(trained)
    assert (tmp_path / "run" / "eval" / "metrics.json").exists()

    parts = tmp_path / "parts"
    for part, images, annotations in (
        ("valid", digits.train_images, digits.train_annotations),
        ("test", digits.val_images, digits.val_annotations),
    ):
        shutil.copytree(images, parts / part)
        shutil.copy(annotations, parts / part / "_annotations.coco.json")
    test = ["--data-path", parts, "--split=test", "--workers=0", "--no-report"]
    cli.main([str(argument) for argument in ["eval", tmp_path / "run", "--output", tmp_path / "test", *test]])
    assert table.findall(capsys.readouterr().out) == table.findall(trained)

    other = json.loads(digits.val_annotations.read_text())
    other["categories"].append({"id": 99, "name": "other"})
    (tmp_path / "other.json").write_text(json.dumps(other))
    val[3] = tmp_path / "other.json"
    message = (
        r"has a class head of 10 rows, and .*other.json needs 11 .*: evaluate on data with the classes of its train"
    )
    with pytest.raises(SystemExit, match=message) as error:
        cli.main([str(argument) for argument in ["eval", tmp_path / "run", "--output", tmp_path / "again", *val]])
    assert "new_class_head" not in str(error.value)

    with pytest.raises(SystemExit, match="run holds a run: give resume to go on with it, overwrite to replace it"):
        cli.main([str(argument) for argument in ["train", *data, *sizes, *short]])
