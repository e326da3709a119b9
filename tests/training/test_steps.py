"""A loop of one's own over the trainer's steps is the trainer's own loop."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from small_runs import small_config, write_images

from groupdetr_fast.build import build_criterion
from groupdetr_fast.data import CocoDataset, EpochSampler, collate, train_transforms
from groupdetr_fast.training import step_ledger
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.engine import Trainer, TrainerSettings, build_accelerator
from groupdetr_fast.training.faults import TrainingError
from groupdetr_fast.training.results import row_of_epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def trainer_in(data, tmp_path):
    """Makes trainers in folders of these names; each begins with the same weights and random states."""

    def build(name, **options):
        config = small_config(data, tmp_path / name)
        optimization = replace(config.optimization, **options)
        accelerator = build_accelerator(optimization, config.output)
        transforms = train_transforms(config.augmentation)
        dataset = CocoDataset(*data.train_paths(), transforms, labels=data.labels, seed=optimization.seed)
        sampler = EpochSampler(dataset, seed=optimization.seed)
        loader = torch.utils.data.DataLoader(dataset, optimization.batch_size, sampler=sampler, collate_fn=collate)
        model = config.model.build(dataset.num_classes)
        settings = TrainerSettings(optimization, config.output)
        return Trainer(accelerator, model, build_criterion(model), loader, settings)

    return build


def same(first, second):
    first, second = first.state.model.state_dict(), second.state.model.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "ema_decay": 0.9}], ids=["plain", "accumulation"])
def test_steps_and_epochs_one_by_one_are_a_whole_training(trainer_in, options):
    whole = trainer_in("whole", **options)
    expected = whole.fit()["epochs"]
    trainer = trainer_in("by_hand", **options)
    for _ in range(trainer.config.epochs):
        trainer.state.model.train()
        for batches in trainer.steps():
            assert trainer.run_step(batches)["loss"].isfinite()
        trainer.finish_epoch()
    assert same(trainer, whole)
    assert [row["train"] for row in trainer.state.history] == [row["train"] for row in expected]
    assert all("metrics" not in row for row in expected)  # nothing was given that evaluates


def test_norms_of_gradients_and_clipped_steps_are_counted(trainer_in):
    """All steps, some or none are clipped, by the norm before clipping."""
    probe = trainer_in("probe", clip_norm=0.0)
    probe.state.model.train()
    norms = []
    for batches in probe.steps():  # all of the weights at the beginning
        norms.append(probe.gradients(batches)[1].item())
        probe.state.optimizer.zero_grad()
    assert len(norms) > 2
    between = sum(sorted(norms)[:2]) / 2
    for clip_norm, clipped in ((0.0, 0), (math.inf, 0), (1e-6, len(norms)), (between, len(norms) - 1)):
        trainer = trainer_in(f"{clip_norm}", clip_norm=clip_norm, lr=0.0, backbone_lr=0.0)
        trainer.state.model.train()
        for batches in trainer.steps():
            trainer.run_step(batches)
        trainer.finish_epoch()
        row = trainer.state.history[0]
        assert row["clipped_steps"] == clipped
        assert row["gradient_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_steps_go_on_where_the_last_one_ended(trainer_in):
    trainer = trainer_in("run")
    trainer.state.model.train()
    ids = []
    for batches in trainer.steps():
        trainer.run_step(batches)
        ids += batches[0].image_ids
        if len(ids) == 4:
            break
    assert trainer.state.batches == 2
    remaining = [image_id for batches in trainer.steps() for image_id in batches[0].image_ids]
    assert sorted(ids + remaining) == list(range(1, 11))


def test_steps_need_no_file_and_their_epochs_differ(trainer_in):
    trainer = trainer_in("run")
    orders = []
    for _ in range(2):
        orders.append([image_id for batches in trainer.steps() for image_id in batches[0].image_ids])
        trainer.state.next_epoch()
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert trainer.state.batches == 10
    assert not trainer.settings.run.exists()


def test_endless_steps_count_each_step_in_its_epoch(trainer_in):
    trainer = trainer_in("run")
    steps = trainer.endless_steps()
    for _ in range(5):
        trainer.run_step(next(steps))
    first = trainer.state.current
    trainer.run_step(next(steps))
    trainer.ledger.settle()
    assert trainer.state.model.training
    assert (first.steps, trainer.state.current.steps, trainer.state.epoch) == (5, 1, 1)
    assert not trainer.settings.run.exists()


def test_a_state_is_saved_and_restored_within_an_epoch(trainer_in):
    trainer = trainer_in("run", ema_decay=0.9)
    trainer.state.model.train()
    steps = trainer.steps()
    for _ in range(3):
        trainer.run_step(next(steps))
    trainer.save()
    assert latest_checkpoint(trainer.settings.run).name == "epoch_0000_batch_000003"
    again = trainer_in("run", ema_decay=0.9)
    assert again.resume()
    assert same(again, trainer)
    assert again.state.batches == 3
    assert again.state.average.updates == trainer.state.average.updates == 3
    for one in (trainer, again):
        assert one.state.scheduler.get_last_lr() == trainer.state.scheduler.get_last_lr()
    first, second = (one.state.current for one in (trainer, again))
    assert first.sums.names == second.sums.names
    assert torch.equal(first.sums.values, second.sums.values)
    assert not trainer_in("another").resume()


def test_one_limit_of_unreadable_images_is_for_all_processes(trainer_in):
    trainer = trainer_in("run")
    dataset = trainer.state.loader.dataset
    dataset.limit, dataset.unreadable = 2, [1, 4]
    trainer.save()
    dataset.unreadable = [1, 4, 7]  # as when processes have met others each, and none too many
    with pytest.raises(TrainingError, match="3 of 10 images cannot be read, over all processes, and 2 are"):
        trainer.save()
    assert latest_checkpoint(trainer.settings.run) is not None


@pytest.fixture
def scaled(trainer_in):
    """A training with a loss scaler, on the CPU in float32, whose first scale is much too large."""
    trainer = trainer_in("scaled", ema_decay=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-14)
    trainer.accelerator.scaler = scaler
    trainer.state.optimizer = AcceleratedOptimizer(trainer.state.optimizer.optimizer, scaler=scaler)
    trainer._step = trainer._build_step()
    trainer.state.model.train()
    return trainer


def test_steps_that_the_scaler_leaves_out_are_counted_and_change_nothing(scaled):
    trainer, before = scaled, {name: value.clone() for name, value in scaled.state.model.state_dict().items()}
    steps = trainer.steps()
    trainer.run_step(next(steps))
    trainer.ledger.settle()
    current = trainer.state.current
    assert (current.steps, current.overflowed, current.overflows_in_a_row, current.skipped) == (0, 1, 1, 0)
    assert trainer.state.average.updates == 0
    after = trainer.state.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # statistics of batch norms too
    while current.overflows_in_a_row:
        losses = trainer.run_step(next(steps))
        trainer.ledger.settle()
    assert losses["loss"].isfinite()
    assert current.steps == trainer.state.average.updates == 1
    assert 1 <= current.overflowed == current.batches - 1
    assert row_of_epoch(trainer.state, graphs=False)["overflowed_steps"] == current.overflowed


def test_gradients_that_overflow_at_any_scale_end_the_run(scaled, monkeypatch):
    monkeypatch.setattr(step_ledger, "MAX_OVERFLOWS_IN_A_ROW", 3)
    scaled.accelerator.scaler.set_backoff_factor(0.999)
    steps = scaled.steps()
    for _ in range(3):
        scaled.run_step(next(steps))
    with pytest.raises(TrainingError, match=r"overflowed in the last 3 steps, though the loss scale of fp16 fell to"):
        scaled.run_step(next(steps))


def test_settings_do_not_change_while_a_training_runs(trainer_in):
    with pytest.raises(FrozenInstanceError):
        trainer_in("run").settings.checkpoint_every = 5
