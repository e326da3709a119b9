"""The command ``groupdetr eval``."""

import json
import re

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
    trained = capsys.readouterr().out

    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_0001"
    evaluation = ["--load", checkpoint, "--output", tmp_path / "eval", "--pictures=0"]
    cli.main([str(argument) for argument in ["eval", *evaluation, *val]])
    table = re.compile(r"^.*Average.*$", re.MULTILINE)
    assert len(table.findall(trained)) >= 6
    assert table.findall(capsys.readouterr().out) == table.findall(trained)
    first, second = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("run", "eval"))
    assert first == second
    assert len(first) > 0
