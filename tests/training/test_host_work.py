"""What the host does in a step beside the model: few operators, no look-ups, no waiting."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small_graphs import Operators, batches_of, build
from torch import nn

from groupdetr_fast.training import setup
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.device_step import HostCopy
from groupdetr_fast.training.engine import _Agreement
from groupdetr_fast.training.faults import StopRequest
from groupdetr_fast.training.gradients import StepGradients
from groupdetr_fast.training.setup import build_accelerator, send_buffers_only_if_trained
from groupdetr_fast.training.step_losses import Losses

BESIDE_THE_MODEL = 40  # operators: 8 of the gradient's norm, 13 of averaged weights, 5 of AdamW
NO_KERNELS = ("aten.detach", "aten.unbind", "aten.select", "aten.unsqueeze", "profiler")


@pytest.fixture
def plain_trainer_in(trainer_in):
    """Makes trainers whose steps are no graphs, and whose backbone has no batch norms that train."""

    def make(name, **options):
        return trainer_in(name, cuda_graphs=0, ema_decay=0.9, **options)

    return make


def operators_beside_the_model(trainer, monkeypatch):
    """Names of the operators of a step but for the model's and the criterion's, and those of their gradients."""
    trainer.run_step(batches_of(1))  # makes the optimiser's state
    original = StepGradients._pass_over_batch
    beside, inside = Operators(), []

    def passing(gradients, *arguments):
        before = len(beside.seen)
        result = original(gradients, *arguments)
        inside.append(beside.seen[before:])
        del beside.seen[before:]
        return result

    monkeypatch.setattr(StepGradients, "_pass_over_batch", passing)
    batches = batches_of(1)
    with beside:
        trainer.run_step(batches)
    monkeypatch.undo()
    assert len(inside[0]) > 1000
    return [name for name, *_ in beside.seen if not name.startswith(NO_KERNELS)]


def without_trained_norms(trainer):
    for module in trainer.state.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return trainer


def test_few_operators_beside_the_model_however_many_losses_and_weights(plain_trainer_in, monkeypatch):
    found = []
    for layers in (1, 4):
        trainer = without_trained_norms(plain_trainer_in(f"{layers}", overrides={"decoder_layers": layers}))
        names = operators_beside_the_model(trainer, monkeypatch)
        trainer.ledger.settle()
        assert len(trainer.state.current.sums.names) > 3 * layers
        found.append([name for name in names if "_local_scalar_dense" not in name])
    assert found[0] == found[1]
    assert len(found[0]) <= BESIDE_THE_MODEL, " ".join(found[0])


def test_modules_are_not_looked_up_in_a_step(plain_trainer_in, monkeypatch):
    trainer = plain_trainer_in("run")
    trainer.run_step(batches_of(1))

    def refuse(*arguments, **options):
        raise AssertionError("looked up")

    for name in ("named_modules", "state_dict"):  # all others go through these
        monkeypatch.setattr(nn.Module, name, refuse)
    trainer.run_step(batches_of(1))


def test_the_host_reads_the_flags_of_a_step_when_the_next_one_is_launched(plain_trainer_in, monkeypatch):
    events = []
    original_step, original_read = torch.optim.AdamW.step, HostCopy.tolist
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (events.append("step"), original_step(self, *args))[1]
    )
    monkeypatch.setattr(HostCopy, "tolist", lambda self: (events.append("read"), original_read(self))[1])
    trainer = plain_trainer_in("run")
    for batch in batches_of(3):
        trainer.run_step([batch])
    assert events == ["step", "step", "read", "step", "read"]
    assert trainer.state.current.steps == 2
    trainer.ledger.settle()
    assert trainer.state.current.steps == 3


def test_processes_exchange_once_a_step():
    """Whether the step is broken, whether one of them is to stop, and whether it is time for a checkpoint."""
    sent = []
    accelerator = SimpleNamespace(reduce=lambda flags, how: (sent.append(flags.tolist()), flags)[1])
    stop = StopRequest()
    times = iter([False, True])
    agree = _Agreement(accelerator, stop, lambda: next(times))
    assert agree(torch.tensor(False)).tolist() == [False, False, False]
    stop.received = True
    assert agree(torch.tensor(True)).tolist() == [True, True, True]
    assert sent == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_what_a_step_says_of_all_processes_is_known_when_it_is_counted(plain_trainer_in):
    trainer = plain_trainer_in("run")
    (batch,) = batches_of(1)
    for flags, expected in (
        ([False, False, False], (False, False)),
        ([False, False, True], (False, True)),
        ([False, True, False], (True, True)),
    ):
        outcome = replace(trainer._step([batch]), flags=torch.tensor(flags))
        trainer.ledger.enqueue([batch], outcome)
        trainer.ledger.settle()
        assert (trainer.ledger.stopping, trainer.ledger.time_is_up) == expected
    trainer.save()  # all processes do so at this step
    assert not trainer.ledger.time_is_up


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("backbone", "sent"), [("resnet18", False), ("conv:8-8", True)])
def test_buffers_are_sent_only_where_batch_norms_train(one_process_group, backbone, sent):
    model = build(backbone=backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = nn.parallel.DistributedDataParallel(model)
        send_buffers_only_if_trained(wrapped)
    assert wrapped.will_sync_module_buffers() == sent
    send_buffers_only_if_trained(model)  # which is no DDP


@pytest.mark.parametrize("cuda", [False, True])
def test_batches_are_copied_without_waiting_where_they_are_pinned(tmp_path, monkeypatch, cuda):
    monkeypatch.setattr(setup.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(setup, "set_seed", lambda seed: None)
    accelerator = build_accelerator(OptimizationConfig(), tmp_path, cpu=True)
    assert accelerator.dataloader_config.non_blocking == cuda


def test_losses_add_up_by_name():
    first, second = (
        {name: torch.tensor(value) for name, value in each.items()}
        for each in ({"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 4.0})
    )
    total = Losses.summed([first, second, first])
    assert {name: value.item() for name, value in total.by_name().items()} == {"a": 2.0, "b": 7.0, "c": 4.0}
    assert total["b"] == 7
    assert (Losses() + Losses()).by_name() == {}
