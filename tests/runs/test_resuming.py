"""Runs that go on, and that begin again: with the same settings and with others."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digit_runs import weights
from safetensors.torch import load_file, save_file

from groupdetr_fast.data import DataError
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.folder import LOCK
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import engine
from groupdetr_fast.training.checkpoint import WEIGHTS, CheckpointError, latest_checkpoint, resumable_checkpoints


def test_a_run_is_replaced_only_if_asked(config):
    short = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0)
    train(config)
    with pytest.raises(ValueError, match="holds a run"):
        train(short)
    missing = replace(short.data, train_images=Path("missing"))
    with pytest.raises(DataError, match="missing"):
        train(replace(short, overwrite=True, data=missing))
    assert latest_checkpoint(config.output).name == "epoch_0003"  # a run that cannot begin replaces nothing
    train(replace(short, overwrite=True))
    assert [row["epoch"] for row in json.loads((config.output / "results.json").read_text())["epochs"]] == [1]
    assert sorted(path.name for path in config.output.glob("checkpoints/*")) == ["best", "epoch_0001"]


def test_resuming_continues_to_the_same_weights(config, tmp_path, monkeypatch):
    train(config)
    interrupted = replace(config, output=tmp_path / "interrupted")

    from groupdetr_fast.training import engine

    finish = engine.Trainer.finish_epoch

    def stop_after_the_first(trainer):
        finish(trainer)
        if trainer.state.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Trainer, "finish_epoch", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted)
    monkeypatch.undo()
    assert latest_checkpoint(interrupted.output).name == "epoch_0001"
    results = train(replace(interrupted, resume=True))
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3]
    first, second = weights(config.output, 3), weights(interrupted.output, 3)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every step of the trainings of a test."""
    found = []
    run_step = engine.Trainer.run_step

    def recording(trainer, batches):
        found.append(trainer.state.optimizer.param_groups[0]["lr"])
        return run_step(trainer, batches)

    monkeypatch.setattr(engine.Trainer, "run_step", recording)
    return found


def after_one_epoch(config):
    """The run, its first of three epochs done: the rate drops after the second."""
    config = replace(config, evaluate_every=3, pictures=0)
    train(replace(config, optimization=replace(config.optimization, epochs=1)))
    return replace(config, resume=True)


def test_rates_follow_the_epochs_of_a_run_that_is_resumed_with_other_batches(config, rates):
    config = after_one_epoch(config)
    assert rates == [1e-3] * 3
    train(replace(config, optimization=replace(config.optimization, batch_size=2)))
    assert rates[3:] == pytest.approx([1e-3] * 5 + [1e-4] * 5)


def test_what_differs_on_resuming_is_applied_or_refused_by_name(config, rates, caplog):
    config = after_one_epoch(config)
    for change, name in (
        ({"model": replace(config.model, num_groups=3)}, "model.num_groups = 2, which cannot become 3"),
        (
            {"model": replace(config.model, model="transformers:a/b")},
            "model.model = conditional_detr_r50, which cannot become transformers:a/b",
        ),
        ({"optimization": replace(config.optimization, seed=1)}, "optimization.seed = 42, which cannot become 1"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {name} on resuming"):
            train(replace(config, **change))
    caplog.clear()
    train(replace(config, optimization=replace(config.optimization, lr=5e-3, lr_drop=(1,), weight_decay=0.5)))
    assert rates[3:] == pytest.approx([5e-4] * 6)
    warnings = [record.getMessage() for record in caplog.records if "resuming with" in record.getMessage()]
    assert warnings == [
        "resuming with optimization.epochs = 3, which was 1",
        "resuming with optimization.lr_drop = (1.0,), which was (2.0,)",
        "resuming with optimization.lr = 0.005, which was 0.001",
        "resuming with optimization.weight_decay = 0.5, which was 0.0001",
    ]
    state = torch.load(latest_checkpoint(config.output) / "state.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.5}


def test_a_backbone_starts_from_random_weights_only_where_the_run_begins(config, caplog):
    said = "the backbone resnet18 starts from random weights"
    config = replace(config, evaluate_every=3, pictures=0, report=False)
    config = config.with_settings(backbone="resnet18", backbone_stages=1, epochs=1, lr_drop=(5,))
    train(config)
    assert caplog.text.count(said) == 1
    caplog.clear()
    train(replace(config, resume=True))
    assert said not in caplog.text
    config.model.build(10)
    assert caplog.text.count(said) == 1


def test_what_a_run_started_from_is_not_needed_again(config, tmp_path):
    gone = tmp_path / "gone.pth"
    model = replace(config.model, backbone="resnet18", backbone_stages=1)
    for change in ({"backbone_weights": str(gone)}, {"load": gone}):
        begun = replace(model, **change)
        with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
            begun.build(10)
        assert begun.build(10, resumed=tmp_path).config.num_groups == 2


def test_a_drop_that_follows_the_epochs_is_named_where_it_moves(config, caplog):
    config = replace(config, evaluate_every=3, pictures=0)
    config = replace(config, optimization=replace(config.optimization, lr_drop=None, epochs=2))
    train(replace(config, optimization=replace(config.optimization, epochs=1)))
    caplog.clear()
    train(replace(config, resume=True))
    warnings = [record.getMessage() for record in caplog.records if "resuming with" in record.getMessage()]
    assert warnings == [
        "resuming with optimization.epochs = 2, which was 1",
        "resuming with optimization.lr_drop = (1.0,), which was ()",
    ]


def test_what_is_refused_on_resuming_changes_nothing(config):
    """The command that was meant still works."""
    config = after_one_epoch(config)
    files = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file() and path.suffix != ".log"}
    wider = replace(config, model=replace(config.model, d_model=64))
    with pytest.raises(ValueError, match=r"was begun with model.d_model = 32, which cannot become 64 on resuming"):
        train(wider)
    assert {path: path.read_bytes() for path in files} == files
    (config.output / "config.yaml").unlink()  # as in the runs of a version that wrote none
    with pytest.raises(CheckpointError) as error:
        train(wider)
    assert re.fullmatch(
        r"checkpoint \S+epoch_0001 does not belong to this training: its model differs in \d+ tensors "
        r"\(bbox_embed.layers.0.bias has shape \[32\] in it and \[64\] here, .*, \.\.\.\): "
        r"resume with the settings that the run was begun with",
        str(error.value),
    )
    assert len(str(error.value)) < 600
    assert len(train(config)["epochs"]) == 3


def test_settings_are_compared_even_where_no_header_can_be_read(config):
    config = after_one_epoch(config)
    for folder in resumable_checkpoints(config.output):
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"groupdetr_fast": "no json"})
    with pytest.raises(ValueError, match=r"was begun with optimization\.seed = 42, which cannot become 1"):
        train(config.with_settings(seed=1))


def test_a_value_that_an_older_version_accepted_is_for_the_user_to_edit(config):
    config = after_one_epoch(config)
    kept = config.output / "config.yaml"
    kept.write_text(kept.read_text().replace("top_k: ", "top_k: -"))
    with pytest.raises(
        ValueError, match=rf"^{kept}: .*top_k.*: edit this file, which the run was begun with, to go on with it$"
    ):
        train(config)
    assert len(resumable_checkpoints(config.output)) > 0


def with_other_classes(config, folder, change):
    """The run with data of as many classes, so that its weights would fit."""
    files = {}
    for part in ("train", "val"):
        content = json.loads(getattr(config.data, f"{part}_annotations").read_text())
        for entry in content["categories"]:
            entry["name"] = f"part {entry['id']}" if change == "name" else entry["name"]
            entry["id"] += 3 * (change == "id")
        for entry in content["annotations"]:
            entry["category_id"] += 3 * (change == "id")
        files[f"{part}_annotations"] = folder / f"{part}.json"
        files[f"{part}_annotations"].write_text(json.dumps(content))
    return replace(config, data=replace(config.data, **files, labels="contiguous"))


@pytest.mark.parametrize("weights", ["gone", "damaged", "without a header"])
def test_classes_are_those_of_the_newest_checkpoint_that_says_them(config, tmp_path, weights):
    config = replace(config.with_settings(epochs=2, lr_drop=(5,)), evaluate_every=3, pictures=0, report=False)
    train(config)
    newest, _ = resumable_checkpoints(config.output)
    if weights == "gone":
        (newest / WEIGHTS).unlink()
    elif weights == "damaged":
        (newest / WEIGHTS).write_bytes(b"damaged")
    else:
        save_file(load_file(newest / WEIGHTS), newest / WEIGHTS)
    config = replace(config.with_settings(epochs=3), resume=True)
    with pytest.raises(ValueError, match="begun with other categories than"):
        train(with_other_classes(config, tmp_path, "name"))
    assert [row["epoch"] for row in train(config)["epochs"]] == [1, 2, 3]


@pytest.mark.parametrize("change", ["name", "id"])
def test_a_run_is_not_resumed_with_other_classes(config, tmp_path, change):
    config = after_one_epoch(config)
    written = (config.output / "config.yaml").read_bytes()
    message = "begun with other categories than .*val.json " + (
        r"\(category 1 is '0' in the run and 'part 1' in the data; .*; and \d+ more\): resume with"
        if change == "name"
        else r"\(category 1, '0', is in the run and not in the data; .*\): resume with"
    )
    with pytest.raises(ValueError, match=message):
        train(with_other_classes(config, tmp_path, change))
    assert (config.output / "config.yaml").read_bytes() == written
    assert len(train(config)["epochs"]) == 3


def test_a_damaged_checkpoint_is_refused(config):
    train(replace(config, optimization=replace(config.optimization, epochs=1)))
    state = latest_checkpoint(config.output) / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint .*epoch_0001 cannot be read"):
        train(replace(config, resume=True))


@pytest.mark.parametrize("within", [False, True], ids=["between epochs", "within one"])
def test_a_run_may_be_resumed_with_fewer_epochs_than_it_has(config, capsys, monkeypatch, within):
    config = replace(config, evaluate_every=10, pictures=0, checkpoint_every=1)
    stopped = "run_step" if within else "finish_epoch"
    original = getattr(engine.Trainer, stopped)

    def stop(trainer, *arguments):
        if within and trainer.state.batches == 8:  # two of the third epoch's three
            raise KeyboardInterrupt
        result = original(trainer, *arguments)
        if not within and trainer.state.epoch == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(engine.Trainer, stopped, stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    capsys.readouterr()
    fewer = replace(config.optimization, epochs=1)
    results = train(replace(config, resume=True, optimization=fewer))
    assert [("metrics" in row) for row in results["epochs"]] == [False, not within]
    assert ("Average Precision" in capsys.readouterr().out) == (not within)


def test_a_run_starts_again_from_its_configuration(config, tmp_path, capsys):
    short = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0)
    train(short)
    again = from_yaml(CocoTrainingConfig, config.output / "config.yaml")
    assert again == short
    train(replace(again, output=tmp_path / "again"))
    first, second = weights(config.output, 1), weights(tmp_path / "again", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def files_of(run):
    """Content and time of every file of a run; the lock says who uses the folder."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != LOCK)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("early", [False, True], ids=["all epochs", "stopped early"])
def test_nothing_of_a_run_that_has_ended_changes(config, capsys, early):
    epochs, said = (1, "nothing to train: the run has 1 epochs, and epochs is 1; a larger number goes on")
    if early:  # AP is that of a detector that has learned nothing
        epochs, said = 9, "stopped early after epoch 2: no better AP for 1 epochs"
    config = replace(
        config,
        optimization=replace(config.optimization, epochs=epochs, lr_drop=None, lr=0.0, backbone_lr=0.0),
        early_stopping=int(early),
        report=True,
        track=("tensorboard",),
    )
    results = train(config)
    assert "nothing to train" not in capsys.readouterr().err
    before = files_of(config.output)
    assert {"config.yaml", "index.html", "results.json", "train.log"} <= {path.name for path in before}
    again = replace(config, resume=True)
    for now in (again, again.with_settings(top_k=7, pictures=3)):
        assert train(now) == json.loads((config.output / "results.json").read_text())
        out, err = capsys.readouterr()
        assert said in err
        assert "Average Precision" in out
        assert f"report: {config.output / 'index.html'}" in out
        assert files_of(config.output) == before
    train(again.with_settings(epochs=results["epochs"][-1]["epoch"] + 1, early_stopping=0, top_k=7))
    assert from_yaml(CocoTrainingConfig, config.output / "config.yaml").top_k == 7
    assert "WARNING resuming with top_k = 7, which was 100" in (config.output / "train.log").read_text()


def test_what_a_run_that_has_ended_lacks_is_made_good(config):
    config = replace(config, optimization=replace(config.optimization, epochs=1))
    results = train(config)
    path = config.output / "results.json"
    whole = path.read_text()
    for row in results["epochs"]:
        row.pop("metrics")
    path.write_text(json.dumps(results))  # as if the process had ended after the evaluation
    train(replace(config, resume=True))
    assert path.read_text() == whole
    train(replace(config, resume=True, report=True))
    assert (config.output / "index.html").exists()


def test_a_run_is_not_resumed_by_its_folder_alone(config):
    train(replace(config, optimization=replace(config.optimization, epochs=1), pictures=0, report=False))
    with pytest.raises(
        ValueError, match=f"name its data and settings.*: --config {config.output}/config.yaml --resume"
    ):
        train(CocoTrainingConfig(output=config.output, resume=True))
