"""Steps as CUDA graphs in the training loop; without a GPU they run uncaptured."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from small_graphs import (
    CONFIG,
    InOrder,
    Numbers,
    assert_close,
    batch_of,
    batches_of,
    build,
    differing,
    run,
    tensors_of,
    uncaptured,
)

import groupdetr_fast as gd
from groupdetr_fast.training import engine
from groupdetr_fast.training.engine import Trainer, TrainerSettings, build_accelerator
from groupdetr_fast.training.faults import TrainingError
from groupdetr_fast.training.graphs import WARM_UP, check_graphs


def test_steps_are_those_without_graphs(trainer_in, device):
    """Up to rounding: sums over padded targets have more terms."""
    options = {"device": device, "ema_decay": 0.9}
    batches = batches_of(2 * WARM_UP, device)
    expected, found = trainer_in("eager", **options, cuda_graphs=0), trainer_in("graphs", **options)
    torch.testing.assert_close(run(found, batches), run(expected, batches), rtol=1e-3, atol=1e-3)
    assert found.state.current.steps == expected.state.current.steps == 2 * WARM_UP
    assert found.state.current.without_graph == WARM_UP
    sums = [trainer.state.current.sums for trainer in (expected, found)]
    assert_close(*(each.by_name() for each in sums), rtol=1e-3, atol=1e-3)
    assert found.state.scheduler.state_dict() == expected.state.scheduler.state_dict()
    assert found.state.average.updates == 2 * WARM_UP


def test_a_broken_step_changes_nothing_and_is_counted(trainer_in, device, caplog):
    trainer = trainer_in("run", device=device, ema_decay=0.9)
    batches = batches_of(WARM_UP + 1, device)
    run(trainer, batches)
    before = tensors_of(trainer)
    assert not trainer.run_step([batch_of(2, 1, seed=7, device=device, spoilt=True)])["loss"].isfinite()
    assert differing(tensors_of(trainer), before) == []
    assert trainer.state.current.skipped == 0  # the host has not looked yet
    run(trainer, batches[:1])
    assert "the loss is not finite: step skipped; image ids [700, 701]" in caplog.text
    assert f"epoch 1, batches {WARM_UP + 2} to {WARM_UP + 2}" in caplog.text
    current = trainer.state.current
    assert (current.steps, current.skipped, current.batches) == (WARM_UP + 2, 1, WARM_UP + 3)
    assert trainer.state.average.updates == WARM_UP + 2
    assert current.sums.values.isfinite().all()
    assert len(differing(tensors_of(trainer), before)) > 100


def test_too_many_broken_steps_end_the_training(trainer_in):
    trainer = trainer_in("run", max_skipped_steps=0)
    trainer.run_step([batch_of(2, 1, spoilt=True)])
    message = "1 steps of epoch 1 had a loss or .* in the last one the loss was not, on the image ids .*: look at these"
    with pytest.raises(TrainingError, match=message):
        trainer.run_step([batch_of(2, 1)])


def test_it_is_told_if_the_gradient_alone_is_not_finite(trainer_in):
    trainer = trainer_in("run", max_skipped_steps=0)
    weight = next(weight for weight in trainer.gradients.bare.parameters() if weight.requires_grad)
    weight.register_hook(lambda gradient: gradient * torch.inf)
    assert trainer.run_step([batch_of(2, 1)])["loss"].isfinite()
    with pytest.raises(TrainingError, match=r"in the last one the gradient was not, .*: lower the learning rate"):
        trainer.run_step([batch_of(2, 1)])


def test_an_epoch_counts_its_last_step(trainer_in):
    trainer = trainer_in("run", epochs=1, accumulate=2)
    (row,) = trainer.fit()["epochs"]
    assert (row["skipped_steps"], row["steps_without_graph"]) == (1, 3)
    assert all(math.isfinite(value) for value in row["train"].values())


def test_sizes_beyond_the_graphs_run_without(trainer_in, device, caplog):
    trainer = trainer_in("run", device=device, cuda_graphs=1)
    run(trainer, batches_of(WARM_UP + 2, device))
    current = trainer.state.current
    assert current.without_graph == WARM_UP
    run(trainer, batches_of(2, device, size=(96, 64)))
    assert caplog.text.count("all 1 graphs are taken, none is of") == 1
    run(trainer, [batch_of(9, 1, device=device)])
    assert "an image has 9 targets" in caplog.text
    assert (current.steps, current.without_graph) == (WARM_UP + 5, WARM_UP + 3)
    run(trainer, batches_of(2, device))
    assert (current.steps, current.without_graph) == (WARM_UP + 7, WARM_UP + 3)


def test_after_an_epoch_it_is_said_what_more_graphs_would_do(trainer_in, caplog):
    """Of 21 steps six and three have sizes that have no graph, and two too many targets."""
    trainer = trainer_in("run", cuda_graphs=1, epochs=2)
    batches = batches_of(10)
    batches += [*batches_of(6, size=(96, 64)), *batches_of(3, size=(64, 96)), batch_of(9, 1), batch_of(1, 9)]
    run(trainer, batches)
    trainer.finish_epoch()
    assert "9 of 21 steps ran without a graph, as all 1 were taken: with cuda_graphs=3 it would be 0" in caplog.text
    assert "2 of 21 steps ran without a graph, as they had an image with more than 8 targets" in caplog.text
    caplog.clear()
    run(trainer, [*batches_of(30), *batches_of(1, size=(96, 64))])
    trainer.finish_epoch()
    assert "graph" not in caplog.text


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)])
def test_checkpoints_serve_runs_with_and_without_graphs(trainer_in, before, after):
    first = trainer_in("run", cuda_graphs=before, ema_decay=0.9)
    run(first, batches_of(WARM_UP + 2))
    first.save()
    second = trainer_in("run", cuda_graphs=after, ema_decay=0.9)
    assert second.resume()
    assert differing(tensors_of(first), tensors_of(second)) == []
    batches = batches_of(WARM_UP + 4)[WARM_UP + 2 :]
    torch.testing.assert_close(run(first, batches), run(second, batches), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_that_is_loaded_later_is_heeded(trainer_in, device):
    """Loading gives the optimiser other tensors, of which graphs that were captured before know nothing."""
    trainer = trainer_in("run", device=device)
    batches = batches_of(WARM_UP + 4, device)
    run(trainer, batches[: WARM_UP + 1])
    trainer.save()
    expected = run(trainer, batches[WARM_UP + 1 :]), tensors_of(trainer)
    assert trainer.resume()
    found = run(trainer, batches[WARM_UP + 1 :]), tensors_of(trainer)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert_close(found[1], expected[1], rtol=1e-2, atol=1e-3)
    assert trainer.state.current.without_graph == 2 * WARM_UP


def test_masks_of_targets_are_refused(trainer_in):
    batch = batch_of(1)
    masks = (torch.zeros(1, 64, 64, dtype=torch.bool),)
    with pytest.raises(ValueError, match="cuda_graphs are for detectors of boxes"):
        trainer_in("run").run_step([replace(batch, targets=replace(batch.targets, masks=masks))])


def test_without_a_gpu_graphs_are_refused(tmp_path):
    PartialState._reset_state()
    accelerator = build_accelerator(CONFIG, tmp_path, cpu=True)
    detector = build()
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=None, sampler=InOrder(Numbers()))
    with pytest.raises(ValueError, match="cuda_graphs need a CUDA GPU, and this training runs on cpu"):
        Trainer(accelerator, detector, gd.build_criterion(detector), loader, TrainerSettings(CONFIG, tmp_path))


@pytest.mark.parametrize(
    ("changes", "options", "observing", "message"),
    [
        ({"distributed_type": DistributedType.MULTI_GPU}, {}, False, "are for one process without DDP or FSDP"),
        ({"scaler": object()}, {}, False, "do not work with precision fp16"),
        ({}, {}, True, "do not work with observe"),
        ({}, {"groups_per_pass": 1}, False, "do not work with groups_per_pass=1"),
        ({}, {"recompute_layers": True}, False, "do not work with recompute_layers=True"),
        ({}, {"compile": True}, False, "do not work with compile=True"),
    ],
)
def test_what_the_host_has_a_part_in_is_refused(changes, options, observing, message):
    fitting = {"device": torch.device("cuda"), "distributed_type": DistributedType.NO, "scaler": None}
    check_graphs(SimpleNamespace(**fitting), CONFIG, observing=False)
    with pytest.raises(ValueError, match=f"cuda_graphs {message}"):
        check_graphs(SimpleNamespace(**fitting | changes), replace(CONFIG, **options), observing=observing)


class Chooser:
    """An observer that looks at every fifth batch."""

    def __init__(self):
        self.seen = []

    def wants(self, step):
        return step % 5 == 0

    def __call__(self, step, model, output, targets):
        self.seen.append((step, targets.max_targets))


def test_an_observer_that_chooses_gets_its_steps_without_a_graph(trainer_in):
    """The others are padded and replayed as without it, and all train as without graphs."""
    observe = Chooser()
    trainer = trainer_in("run", observe=observe)
    plain = trainer_in("plain", cuda_graphs=0)
    replayed = []
    for step in range(1, 12):
        batch = batch_of(1 + step % 4, seed=step)
        losses, expected = trainer.run_step([batch]), plain.run_step([batch])
        torch.testing.assert_close(losses["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
        replayed.append(trainer.ledger._enqueued.outcome.replayed)
    assert [step for step, _ in observe.seen] == [5, 10]
    assert [targets for _, targets in observe.seen] == [2, 3]  # as the batch has them: not padded
    assert replayed == [False] * WARM_UP + [True, False, True, True, True, True, False, True]
    assert trainer.state.current.without_graph == WARM_UP + 2


def test_only_an_observer_that_chooses_goes_with_graphs(trainer_in, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "check_graphs", lambda *arguments, observing: asked.append(observing))
    for observe in (None, Chooser(), lambda *_: None):
        trainer_in("run", observe=observe)
    assert asked == [False, False, True]


def test_frozen_parts_stay_in_captured_steps(trainer_in):
    trainer = uncaptured(trainer_in("run", freeze=("encoder",), ema_decay=0.9))
    before = tensors_of(trainer)
    run(trainer, batches_of(2))
    after = tensors_of(trainer)
    moved = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith("model.encoder.")]
    assert not [
        name for name in differing(before, {name: after[name] for name in before}) if "average.encoder." in name
    ]
