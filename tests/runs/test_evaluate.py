"""Evaluations of saved weights."""

import json
from dataclasses import replace

from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.train import train


def test_evaluation_of_saved_weights_gives_the_same_numbers(config):
    results = train(config)
    saved = config.output / "checkpoints" / "epoch_0003"
    model = replace(config.model, load=saved, num_groups=1)
    data = replace(config.data, train_images=None, train_annotations=None)
    metrics = evaluate_checkpoint(replace(config, data=data, model=model, output=config.output.parent / "eval"))
    assert metrics == results["epochs"][-1]["metrics"]


def test_evaluating_with_other_categories_is_warned_about(config, digits, tmp_path, caplog):
    train(replace(config, optimization=replace(config.optimization, epochs=1), pictures=0))
    content = json.loads(digits.val_annotations.read_text())
    content["categories"][3]["name"] = "another"
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = replace(config.data, train_images=None, train_annotations=None, val_annotations=tmp_path / "val.json")
    model = replace(config.model, load=config.output / "checkpoints" / "best", num_groups=1)
    evaluate_checkpoint(replace(config, data=data, model=model, output=tmp_path / "eval", pictures=0))
    assert "trained on other categories" in caplog.text
