"""One real run of a sweep."""

import itertools
import json
from dataclasses import replace

import pytest
from filelock import FileLock

from groupdetr_fast.analysis import run as run_module
from groupdetr_fast.analysis.run import Run, RunError, RunResults, execute
from groupdetr_fast.runs.evaluate import evaluate
from groupdetr_fast.training import engine
from groupdetr_fast.training.engine import Trainer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


def test_a_run_trains_measures_and_keeps_its_last_checkpoint(training, folder, monkeypatch):
    run = Run(training, 0.6)
    run.prepare(folder)
    monkeypatch.setattr(run_module, "DISTANCES_EVERY", 2)
    execute(folder)
    assert run.is_done(folder)
    results = RunResults.read(folder)
    assert [row["epoch"] for row in results.epochs] == [1, 2]
    assert results.usages["one_group"] == results.epochs[-1]["metrics"]
    assert [row["step"] for row in results.distances] == [1, 2, 4]
    assert results.checkpoint.name == "epoch_0002"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best", "epoch_0002"}


def test_a_finished_training_is_only_measured_again(training, folder, monkeypatch):
    run = Run(training, 0.6)
    run.prepare(folder)
    execute(folder)
    before = (folder / "results.json").read_text()
    again = Run(training, 0.5)
    assert not again.is_done(folder)
    again.prepare(folder)
    monkeypatch.setattr(run_module, "train", None)
    execute(folder)
    assert again.is_done(folder)
    assert (folder / "results.json").read_text() == before


def interrupt_at_the_second(function):
    calls = itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


@pytest.mark.parametrize(("interrupted_at", "epochs_done"), [("train", 1), ("evaluation", 1), ("evaluate_usages", 2)])
def test_an_interrupted_run_goes_on_where_it_was(training, folder, monkeypatch, interrupted_at, epochs_done):
    run = Run(training, 0.6)
    run.prepare(folder)
    finish = Trainer.finish_epoch

    def interrupt_after_an_epoch(trainer):
        finish(trainer)
        raise KeyboardInterrupt

    def interrupt(*_):
        raise KeyboardInterrupt

    if interrupted_at == "train":
        monkeypatch.setattr(Trainer, "finish_epoch", interrupt_after_an_epoch)
    elif interrupted_at == "evaluation":  # of the last epoch, whose weights are there then
        monkeypatch.setattr("groupdetr_fast.runs.train.evaluate", interrupt_at_the_second(evaluate))
    else:
        monkeypatch.setattr(run_module, "evaluate_usages", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute(folder)
    assert run.epochs_done(folder) == epochs_done
    assert not run.is_done(folder)
    monkeypatch.undo()
    execute(folder)
    assert run.is_done(folder)
    assert [row["epoch"] for row in RunResults.read(folder).epochs] == [1, 2]


def test_a_run_with_graphs_records_the_same_distances(training, tmp_path, monkeypatch):
    """Its steps are replayed on the CPU too, but for the first three of their size and those that are recorded."""
    monkeypatch.setattr(engine, "check_graphs", lambda *arguments, observing: None)
    monkeypatch.setattr(run_module, "DISTANCES_EVERY", 6)
    plain = replace(training, optimization=replace(training.optimization, epochs=4, lr=1e-3, backbone_lr=1e-3))
    graphs = {"cuda_graphs": 1, "graph_image_multiple": 16, "graph_targets": (4,)}
    found = []
    for name, settings in {"plain": {}, "graphs": graphs}.items():
        Run(replace(plain, optimization=replace(plain.optimization, **settings)), 0.6).prepare(tmp_path / name)
        execute(tmp_path / name)
        found.append(RunResults.read(tmp_path / name))
    expected, replayed = found
    assert [row["steps_without_graph"] for row in replayed.epochs] == [2, 2, 1, 0]
    assert [row["step"] for row in replayed.distances] == [row["step"] for row in expected.distances] == [1, 6]
    for row, other in zip(replayed.distances, expected.distances, strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    losses = [[row["train"]["loss"] for row in each.epochs] for each in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_two_processes_do_not_make_the_same_run(training, folder, monkeypatch):
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0)
    Run(training, 0.6).prepare(folder)
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="another process is at work in"):
        execute(folder)


def test_settings_of_another_version_are_refused(training, folder):
    Run(training, 0.6).prepare(folder)
    settings = json.loads((folder / "settings.json").read_text())
    del settings["training"]["model"]["num_groups"]
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match=r"key training\.model\.num_groups is missing"):
        execute(folder)
