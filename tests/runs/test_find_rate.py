"""``groupdetr find-rate`` on a small run."""

import csv
from dataclasses import replace

import pytest
import torch
from PIL import Image

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.runs.find_rate import find_rate
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.engine import Trainer
from groupdetr_fast.training.faults import TrainingError
from groupdetr_fast.training.rate_finder import SweepSettings


@pytest.fixture
def config(config):
    return replace(config, report=False, pictures=0, track=())


@pytest.fixture
def steps(monkeypatch):
    """The rates of all groups in every step, and the loss that each had."""
    seen = []
    original = Trainer.run_step

    def run_step(self, batches):
        rates = [group["lr"] for group in self.state.optimizer.param_groups]
        losses = original(self, batches)
        seen.append((rates, losses["loss"].item()))
        return losses

    monkeypatch.setattr(Trainer, "run_step", run_step)
    return seen


def test_a_sweep_has_a_picture_a_table_and_a_suggestion(config, steps, capsys):
    optimization = replace(config.optimization, lr=1e-3, backbone_lr=1e-4, warmup_steps=50)
    sweep = find_rate(replace(config, optimization=optimization), SweepSettings(rate_from=1e-5, rate_steps=25))
    assert [rates[0] for rates, _ in steps[: len(sweep.rates)]] == pytest.approx(list(sweep.rates))
    assert all(rates[1] == pytest.approx(rates[0] / 10) for rates, _ in steps)  # in proportion, whatever the schedule
    assert [loss for _, loss in steps[: len(sweep.rates)]] == pytest.approx(list(sweep.losses), rel=1e-5)
    assert sweep.rates[0] == pytest.approx(1e-5)
    assert sweep.smoothed[0] == pytest.approx(sweep.losses[0])
    average = 0.0
    for number, (loss, smoothed) in enumerate(zip(sweep.losses, sweep.smoothed, strict=True), start=1):
        average = 0.98 * average + 0.02 * loss
        assert smoothed == pytest.approx(average / (1 - 0.98**number))
    with (config.output / "rates.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["lr", "loss", "smoothed"]
    assert [[float(cell) for cell in row] for row in rows[1:]] == [
        list(row) for row in zip(sweep.rates, sweep.losses, sweep.smoothed, strict=True)
    ]
    with Image.open(config.output / "rates.png") as picture:
        assert min(picture.size) > 300
    said = capsys.readouterr().out
    assert f"suggested: --lr {sweep.valley:.2g} --backbone-lr {sweep.valley / 10:.2g}" in said
    assert "--query-lr" not in said
    assert f"steepest: {sweep.steepest:.2g}; picture: {config.output / 'rates.png'}" in said
    assert not (config.output / "checkpoints").exists()


def test_a_rate_of_queries_keeps_its_proportion(config, steps, capsys):
    optimization = replace(config.optimization, lr=1e-3, backbone_lr=1e-4, query_lr=1e-2)
    sweep = find_rate(replace(config, optimization=optimization), SweepSettings(rate_from=1e-5, rate_steps=12))
    assert all(rates[2] == pytest.approx(10 * rates[0]) for rates, _ in steps)
    rates = (sweep.valley, sweep.valley / 10, sweep.valley * 10)
    expected = "suggested: --lr {:.2g} --backbone-lr {:.2g} --query-lr {:.2g}".format(*rates)
    assert expected in capsys.readouterr().out


def test_a_sweep_ends_where_the_loss_diverges(config, steps):
    config = replace(config, optimization=replace(config.optimization, clip_norm=0.0))
    sweep = find_rate(config, SweepSettings(rate_from=1e-4, rate_to=1e12, rate_steps=60))
    assert sweep.diverged
    assert len(sweep.rates) < 60
    assert sweep.smoothed[-1] > 4 * min(sweep.smoothed) or len(steps) == len(sweep.rates) + 1
    assert sweep.valley < sweep.rates[-1]


def test_a_loss_that_is_not_finite_from_the_beginning_is_said(config, monkeypatch):
    original = Trainer.run_step
    monkeypatch.setattr(
        Trainer, "run_step", lambda self, batches: {"loss": original(self, batches)["loss"] * float("nan")}
    )
    with pytest.raises(TrainingError, match="diverged after 0 steps, at the rate 1e-07: begin with a lower rate_from"):
        find_rate(config)
    with pytest.raises(ValueError, match="lr must not be 0"):
        find_rate(replace(config, optimization=replace(config.optimization, lr=0.0)))


def test_the_folder_of_a_run_keeps_what_is_in_it(config):
    config = replace(config, optimization=replace(config.optimization, epochs=1, lr_drop=(1,)))
    train(config)
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    find_rate(config, SweepSettings(rate_steps=10))
    after = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if path.name not in ("rates.csv", "rates.png")} == before


def test_the_command_takes_the_flags_of_a_training(config, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    monkeypatch.chdir(tmp_path)
    cli.main(["find-rate", "--config", "config.yaml", "--rate-steps", "12", "--freeze", "encoder", "--batch-size", "2"])
    assert len((tmp_path / "runs" / "rate" / "rates.csv").read_text().splitlines()) == 13
    assert not config.output.exists()
    with pytest.raises(SystemExit):
        cli.main(["find-rate", "--config", "config.yaml", "--rate-steps", "3"])


def test_a_detector_keeps_its_weights(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(config, optimization=replace(config.optimization, epochs=1, lr_drop=(1,)))
    train(config)
    detector = gd.Detector.from_pretrained(config.output)
    before = {name: tensor.clone() for name, tensor in detector.model.state_dict().items()}
    files = {name: getattr(config.data, name) for name in ("train_images", "train_annotations")}
    sizes = {"short_sides": (40, 48), "crop": 0.0, "batch_size": 4, "workers": 0}
    sweep = detector.find_rate(**files, **sizes, rate_steps=10, rate_from=1e-6)
    assert len(sweep.rates) == 10
    assert (tmp_path / "runs" / "rate" / "rates.png").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.model.state_dict().items())
    with pytest.raises(ValueError, match="there is no setting 'rate_step'"):
        detector.find_rate(rate_step=3)
