"""Evaluations of saved weights."""

import json
import os
import signal
from dataclasses import replace

import pytest

from groupdetr_fast.data import CocoDataset
from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.faults import TrainingError, deaths_of_processes_explained


def test_evaluation_of_saved_weights_gives_the_same_numbers(config):
    results = train(config)
    saved = config.output / "checkpoints" / "epoch_0003"
    model = replace(config.model, load=saved, num_groups=1)
    data = replace(config.data, train_images=None, train_annotations=None)
    metrics = evaluate_checkpoint(replace(config, data=data, model=model, output=config.output.parent / "eval"))
    assert metrics == results["epochs"][-1]["metrics"]
    written = (config.output / "detections.json").read_text()
    with pytest.raises(ValueError, match=f"{config.output} holds a run, .*: give .*, such as --output .*run/eval"):
        evaluate_checkpoint(replace(config, data=data, model=model, top_k=1))
    assert (config.output / "detections.json").read_text() == written


def test_evaluating_with_other_categories_is_warned_about(config, digits, tmp_path, caplog):
    train(replace(config, optimization=replace(config.optimization, epochs=1), pictures=0))
    content = json.loads(digits.val_annotations.read_text())
    content["categories"][3]["name"] = "another"
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = replace(config.data, train_images=None, train_annotations=None, val_annotations=tmp_path / "val.json")
    model = replace(config.model, load=config.output / "checkpoints" / "best", num_groups=1)
    evaluate_checkpoint(replace(config, data=data, model=model, output=tmp_path / "eval", pictures=0))
    said = f"than those of {tmp_path / 'val.json'} (category 4 is '3' in the checkpoint and 'another' in the data): its"
    assert said in caplog.text


def test_a_killed_worker_ends_an_evaluation_in_one_sentence(config, monkeypatch):
    config = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0, report=False)
    train(config)

    def die(dataset, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(CocoDataset, "__getitem__", die)  # which workers alone call
    model = replace(config.model, load=config.output / "checkpoints" / "best", num_groups=1)
    data = replace(config.data, workers=1)
    with pytest.raises(TrainingError, match=r"a process that loads images died .*; run the same command again"):
        evaluate_checkpoint(replace(config, data=data, model=model, output=config.output / "eval"))


def test_the_death_of_another_process_is_one_sentence():
    gloo = "[pair.cc:561] Connection closed by peer [127.0.0.1]:41128. This is typically caused by"
    message = r"another process of this command has ended.*; run the same command again"
    with pytest.raises(TrainingError, match=message), deaths_of_processes_explained("run the same command again"):
        raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="another fault"), deaths_of_processes_explained():
        raise RuntimeError("another fault")
