"""What the trainer's options do in whole runs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    final_weights,
    kill_before,
    run_process,
    same_weights,
    small_config,
    terminate_before,
    write_images,
)

from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import engine, progress
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.config import OptimizationConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data, tmp_path):
    return small_config(data, tmp_path / "run")


def with_options(config, **options):
    return replace(config, optimization=replace(config.optimization, **options))


OPTIONS = [
    pytest.param({"ema_decay": 0.9}, id="ema"),
    pytest.param({"groups_per_pass": 1, "recompute_layers": True, "accumulate": 2}, id="passes"),
    pytest.param({"precision": "bf16", "ema_decay": 0.99, "groups_per_pass": 1}, id="bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_with_options_resumes_exactly(config, tmp_path, options):
    config = with_options(config, **options)
    status, log = run_process(config)
    assert status == 0, log
    expected = final_weights(config)
    again = replace(config, output=tmp_path / "again", checkpoint_every=1)
    status, log = run_process(again, kill_before, "AdamW.step", 6)
    assert status == -9, log
    status, log = run_process(replace(again, resume=True), terminate_before, "AdamW.step", 2)
    assert status == 75, log
    status, log = run_process(replace(again, resume=True))
    assert status == 0, log
    assert same_weights(again, expected)


def test_averaged_weights_are_evaluated_and_saved(config, tmp_path):
    config = with_options(config, ema_decay=0.9)
    results = train(config)
    folder = latest_checkpoint(config.output)
    averaged = load_file(folder / "model.safetensors")
    trained = torch.load(folder / "state.pt", weights_only=True)["weights"]
    assert averaged.keys() == trained.keys()
    assert not torch.equal(averaged["refpoint_embed.weight"], trained["refpoint_embed.weight"])
    model = replace(config.model, load=folder, num_groups=1)
    metrics = evaluate_checkpoint(replace(config, model=model, output=tmp_path / "eval"))
    assert metrics == results["epochs"][-1]["metrics"]


def test_passes_train_as_all_groups_at_once_do(config, tmp_path):
    config = replace(config, model=replace(config.model, dropout=0.0))
    expected = train(config)["epochs"]
    found = train(with_options(replace(config, output=tmp_path / "passes"), groups_per_pass=1))["epochs"]
    for first, second in zip(expected, found, strict=True):
        assert second["train"] == pytest.approx(first["train"], rel=1e-3)


def test_results_report_the_peak_memory(config):
    train(with_options(config, epochs=1))
    results = json.loads((config.output / "results.json").read_text())
    assert results["peak_memory_mib"] == results["epochs"][0]["peak_memory_mib"] > 0


class Gpu:
    """What is asked of torch about the memory of a GPU."""

    peak = 0

    def is_available(self):
        return True

    def max_memory_allocated(self):
        return self.peak * 2**20

    def reset_peak_memory_stats(self):
        self.peak = 0


def test_the_peak_memory_of_an_epoch_is_its_own(config, monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(progress, "torch", SimpleNamespace(cuda=gpu))
    run_step = engine.Trainer.run_step

    def use_memory(trainer, batches):
        gpu.peak = max(gpu.peak, (300, 500, 200)[trainer.state.epoch])
        return run_step(trainer, batches)

    monkeypatch.setattr(engine.Trainer, "run_step", use_memory)
    results = train(config)
    assert [row["peak_memory_mib"] for row in results["epochs"]] == [300, 500, 200]
    assert results["peak_memory_mib"] == 500


@pytest.mark.slow
@pytest.mark.parametrize("groups_per_pass", [0, 1])
def test_a_compiled_model_trains_to_the_same_losses(config, tmp_path, groups_per_pass):
    # Without dropout and denoising queries: compiled code draws other random numbers.
    model = replace(config.model, model="conditional_detr_r50", dropout=0.0)
    config = with_options(replace(config, model=model), epochs=1, groups_per_pass=groups_per_pass)
    expected = train(config)["epochs"]
    found = train(with_options(replace(config, output=tmp_path / "compiled"), compile=True))["epochs"]
    assert found[0]["train"] == pytest.approx(expected[0]["train"], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ema_decay": 1.0}, "ema_decay must be in"), ({"groups_per_pass": -1}, "groups_per_pass must not be negative")],
)
def test_wrong_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizationConfig(**settings)


def test_a_checkpoint_is_written_when_the_last_one_is_old(config, monkeypatch):
    """Steps of 25 seconds, five in an epoch: after the third a minute has passed, of which evaluations are no part."""
    clock = [0.0]
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0]))
    saved = []
    step, save = engine.Trainer.run_step, engine.Trainer.save
    evaluate = engine.Trainer._evaluate_last_epoch

    def evaluate_for_long(trainer):
        clock[0] += 1000
        evaluate(trainer)

    monkeypatch.setattr(engine.Trainer, "_evaluate_last_epoch", evaluate_for_long)

    def run_step(trainer, batches):
        clock[0] += 25
        return step(trainer, batches)

    def record(trainer):
        save(trainer)
        saved.append((trainer.state.epoch, trainer.state.current.batches))

    monkeypatch.setattr(engine.Trainer, "run_step", run_step)
    monkeypatch.setattr(engine.Trainer, "save", record)
    train(replace(config, checkpoint_minutes=1.0))
    assert saved == [(0, 3), (1, 0), (1, 3), (2, 0), (2, 3), (3, 0)]
    with pytest.raises(ValueError, match="checkpoint_minutes must not be negative, got -1"):
        replace(config, checkpoint_minutes=-1)
