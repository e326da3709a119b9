"""Early stopping, the best epoch, and the checkpoints that are kept."""

import json
from dataclasses import replace

import pytest
import torch
from digit_runs import weights
from safetensors.torch import load_file

from groupdetr_fast.models.checkpoints import read_header
from groupdetr_fast.runs.evaluate import evaluate
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import checkpoint, engine


def with_aps(monkeypatch, *aps):
    """Let the evaluations of runs find these APs, epoch by epoch."""
    measured = iter(aps)

    def evaluate_as_told(*arguments):
        return {**evaluate(*arguments), "AP": next(measured)}

    monkeypatch.setattr("groupdetr_fast.runs.train.evaluate", evaluate_as_told)


def best_metadata(run):
    header = read_header(run / "checkpoints" / "best")
    return header.epoch, header.AP


def test_a_run_stops_early_and_keeps_the_best(config, monkeypatch):
    with_aps(monkeypatch, 0.1, 0.4, 0.3, 0.4, 0.9)
    epochs = replace(config.optimization, epochs=5)
    results = train(replace(config, optimization=epochs, early_stopping=2, pictures=0))
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3, 4]
    assert results["best_epoch"] == 2
    assert best_metadata(config.output) == (2, 0.4)
    best = load_file(config.output / "checkpoints" / "best" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(config.output, 2).items())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, ["best", "epoch_0004", "epoch_0005"]), (3, ["best", "epoch_0003", "epoch_0004", "epoch_0005"])],
)
def test_as_many_checkpoints_are_kept_as_asked(config, monkeypatch, keep, kept):
    with_aps(monkeypatch, 0.1, 0.4, 0.3, 0.2, 0.1)
    epochs = replace(config.optimization, epochs=5)
    config = replace(config, optimization=epochs, keep_checkpoints=keep, pictures=0)
    assert train(config)["best_epoch"] == 2
    assert sorted(path.name for path in config.output.glob("checkpoints/*")) == kept
    assert best_metadata(config.output) == (2, 0.4)  # though the epoch's own folder is gone
    assert train(replace(config, resume=True))["best_epoch"] == 2


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_early_stopping_and_the_best_epoch_survive_resuming(config, monkeypatch, stopped_after):
    aps = (0.3, 0.5, 0.52, 0.51, 0.9)
    config = replace(
        config,
        optimization=replace(config.optimization, epochs=5),
        early_stopping=2,
        early_stopping_delta=0.05,
        pictures=0,
    )
    original = checkpoint.mark_best

    def fail(run, epoch):  # at the worst moment: the epoch is saved, and not yet marked as the best
        if len(list((run / "checkpoints").glob("epoch_*"))) == stopped_after:
            raise KeyboardInterrupt
        original(run, epoch)

    with_aps(monkeypatch, *aps)
    monkeypatch.setattr(engine, "mark_best", fail)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(engine, "mark_best", original)
    with_aps(monkeypatch, *aps[stopped_after:])
    results = train(replace(config, resume=True))
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3, 4]
    assert best_metadata(config.output) == (3, 0.52)
    again = train(replace(config, resume=True))  # nothing is left to do
    assert again == json.loads(json.dumps(results))
