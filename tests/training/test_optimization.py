import pytest
import torch

from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.optimization import build_optimizer, build_scheduler, go_on_at


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(2, 2)
        self.backbone.bias.requires_grad_(False)
        self.head = torch.nn.Linear(2, 2)


def rates(config, steps, steps_per_epoch):
    optimizer = build_optimizer(Model(), config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def test_two_rates_and_no_frozen_parameters():
    optimizer = build_optimizer(Model(), OptimizationConfig())
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(2, 1e-4), (1, 1e-5)]
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_norms_and_embeddings_without_decay(weight_decay):
    model = Model()
    model.norm, model.table = torch.nn.LayerNorm(2), torch.nn.Embedding(3, 2)
    model.backbone = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = build_optimizer(model, OptimizationConfig(weight_decay=weight_decay, decay_norms=False))
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(2, 1e-4, weight_decay), (3, 1e-4, 0), (2, 1e-5, weight_decay), (2, 1e-5, 0)]


@pytest.mark.parametrize("decay_norms", [True, False])
def test_a_rate_of_queries(decay_norms):
    model = Model()
    model.queries = torch.nn.Embedding(3, 2)
    model.is_query = lambda name: name.startswith("queries.")
    config = OptimizationConfig(query_lr=1e-3, weight_decay=0.05, decay_norms=decay_norms)
    groups = build_optimizer(model, config).param_groups
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(2, 1e-4), (1, 1e-5), (1, 1e-3)]
    assert groups[2]["params"] == [model.queries.weight]
    assert groups[2]["weight_decay"] == (0.05 if decay_norms else 0)
    groups = build_optimizer(model, OptimizationConfig()).param_groups  # those of checkpoints that have no such rate
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(3, 1e-4), (1, 1e-5)]


def test_a_rate_of_queries_needs_queries_that_are_trained():
    model = Model()
    with pytest.raises(ValueError, match="query_lr is the rate of learned queries, of which Model trains none"):
        build_optimizer(model, OptimizationConfig(query_lr=1e-3))
    model.queries = torch.nn.Embedding(3, 2).requires_grad_(False)
    model.is_query = lambda name: name.startswith("queries.")
    with pytest.raises(ValueError, match="of which Model trains none"):
        build_optimizer(model, OptimizationConfig(query_lr=1e-3))


def test_step_drop_after_the_given_epoch():
    found = rates(OptimizationConfig(epochs=4, lr_drop=(3,)), steps=8, steps_per_epoch=2)
    assert [row[0] for row in found] == pytest.approx([1e-4] * 6 + [1e-5] * 2)
    assert [row[1] for row in found] == pytest.approx([1e-5] * 6 + [1e-6] * 2)


@pytest.mark.parametrize(("epochs", "drops"), [(1, ()), (2, (1,)), (12, (11,)), (50, (46,)), (100, (92,))])
def test_the_drop_follows_the_epochs_unless_it_is_given(epochs, drops):
    assert OptimizationConfig(epochs=epochs).drops == drops
    assert OptimizationConfig(epochs=epochs).resolved().lr_drop == drops
    found = rates(OptimizationConfig(epochs=epochs), steps=2 * epochs, steps_per_epoch=2)
    last = 2 * (epochs - drops[0]) if drops else 0
    assert [row[0] for row in found] == pytest.approx([1e-4] * (2 * epochs - last) + [1e-5] * last)
    assert OptimizationConfig(epochs=epochs, lr_drop=()).drops == ()


def test_several_drops_within_epochs():
    found = rates(OptimizationConfig(epochs=2, lr_drop=(0.5, 1.75)), steps=8, steps_per_epoch=4)
    assert [row[0] for row in found] == pytest.approx([1e-4] * 2 + [1e-5] * 5 + [1e-6])


def test_a_schedule_goes_on_at_another_step():
    config = OptimizationConfig(epochs=4, lr_drop=(3,), warmup_steps=4, lr=1.0, backbone_lr=0.5)
    optimizer = build_optimizer(Model(), config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch=2)
    found = []
    for step in (2, 6, 1):
        go_on_at(scheduler, step)
        found.append([group["lr"] for group in optimizer.param_groups])
        assert scheduler.get_last_lr() == found[-1]
    assert found == [pytest.approx(rates) for rates in ([0.75, 0.375], [0.1, 0.05], [0.5, 0.25])]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.75)


def test_cosine_with_warmup():
    config = OptimizationConfig(epochs=5, decay="cosine", warmup_steps=4, lr=1.0, backbone_lr=0.5)
    found = [row[0] for row in rates(config, steps=11, steps_per_epoch=2)]
    assert found[0] == pytest.approx(0.25)
    assert found[1] == pytest.approx(0.5, rel=0.05)
    assert found[5] == pytest.approx(0.5)
    assert found[10] == pytest.approx(0)


def test_named_schedules_are_the_papers():
    assert OptimizationConfig(schedule="12e").resolved() == OptimizationConfig(epochs=12, lr_drop=(11,)).resolved()
    assert OptimizationConfig(schedule="50e").resolved() == OptimizationConfig(epochs=50, lr_drop=(40,)).resolved()
    assert OptimizationConfig().resolved() == OptimizationConfig(precision="no", lr_drop=(11,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": -1.0}, "lr must not be negative"),
        ({"query_lr": -1.0}, "query_lr must not be negative"),
        ({"lr_drop": (8, 0)}, "lr_drop must hold positive epochs"),
        ({"schedule": "24e"}, "schedule must be one of 12e, 50e or None"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizationConfig(**settings)
