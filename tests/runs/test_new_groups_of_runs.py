"""Where the groups of a run begin, and the rate at which their queries are trained."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digit_runs import weights

from groupdetr_fast.models.checkpoints import CheckpointHeader
from groupdetr_fast.runs.config import ModelConfig
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.checkpoint import write_weights

QUERIES = "query_embed.weight"


def queries_of(model):
    return model.get_parameter(QUERIES).detach().unflatten(0, (model.config.num_groups, -1))


def with_model(config, **settings):
    return replace(config, model=replace(config.model, **settings))


def with_optimization(config, **settings):
    return replace(config, optimization=replace(config.optimization, epochs=1, lr_drop=(1,), **settings))


@pytest.fixture
def config(config):
    """A run without what no test here looks at."""
    return replace(config, report=False, pictures=0, track=())


def test_groups_begin_near_group_0_if_asked(config):
    for noise in (0.0, 0.1, None):
        torch.manual_seed(0)
        first, second = queries_of(replace(config.model, group_init_noise=noise).build(3))
        distance = ((second - first).std() / first.std()).item()
        assert distance == pytest.approx({0.0: 0.0, 0.1: 0.1, None: 2**0.5}[noise], rel=0.2)


def test_groups_of_a_checkpoint_stay_and_new_ones_begin_near_its_first(config, tmp_path):
    torch.manual_seed(0)
    source = config.model.build(3)
    header = CheckpointHeader(model=config.model.model, model_config={"num_groups": 2, "num_queries": 5})
    write_weights(tmp_path / "two.safetensors", source.state_dict(), header.to_json())
    settings = {"load": tmp_path / "two.safetensors", "num_groups": 4, "num_queries": 5}
    model = replace(config.model, **settings, group_init_noise=0.0).build(3)
    two, four = queries_of(source)[:, :5], queries_of(model)
    assert torch.equal(four[:2], two)
    assert torch.equal(four[2:], two[:1].expand(2, -1, -1))


def test_a_run_with_equal_groups_trains_and_keeps_to_its_beginning(config, capsys):
    config = with_optimization(with_model(config, group_init_noise=0.0, dropout=0.0))
    train(config)
    first, second = weights(config.output, 1)[QUERIES].unflatten(0, (2, -1))
    # Both get the same gradients; the order of sums differs.
    torch.testing.assert_close(second, first, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"was begun with model.group_init_noise = 0.0, which cannot become 0.2"):
        train(replace(with_model(config, group_init_noise=0.2), resume=True))


def test_the_example_says_how_far_queries_have_moved(config, capsys, monkeypatch):
    """The beginning that it makes anew is that of the run: what has the rate 0 has not moved."""
    config = with_optimization(config, lr=0.0, backbone_lr=0.0, query_lr=1e-3)
    train(config)
    still = replace(with_optimization(config, query_lr=0.0), output=config.output.with_name("still"))
    train(still)
    path = Path(__file__).parents[2] / "examples" / "moved_queries.py"
    spec = importlib.util.spec_from_file_location("moved_queries", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["moved_queries", str(config.output), str(still.output)])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    found, begun = (weights(each.output, 1)[QUERIES] for each in (config, still))
    moved, first, second = (found - begun).square().mean().sqrt(), *found.chunk(2)
    between = (second - first).square().mean().sqrt()
    assert [line for line in lines if not line.startswith(" ")] == ["run, epoch_0001", "still, epoch_0001"]
    assert f"moved {moved:.4f}, between groups {between:.3f}," in lines[1]
    assert "moved 0.0000" in lines[4]
    assert lines[2::3] == ["  matrices of the decoder's layers: moved by 0.0 % of their norm"] * 2


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_wrong_noise_is_refused(noise):
    with pytest.raises(ValueError, match="group_init_noise must be at least 0"):
        ModelConfig(group_init_noise=noise)


def test_queries_have_their_rate(config):
    """With all other rates at 0, queries alone move; they move as in the run whose every rate is theirs at first."""
    config = with_optimization(config, lr=0.0, backbone_lr=0.0, query_lr=1e-3)
    torch.manual_seed(config.optimization.seed)
    train(config)
    still = with_optimization(replace(config, output=config.output.with_name("still")), query_lr=None)
    train(still)
    found, begun = weights(config.output, 1), weights(still.output, 1)
    assert {name for name in found if not torch.equal(found[name], begun[name])} == {QUERIES}
    assert 1e-4 < (found[QUERIES] - begun[QUERIES]).abs().max() < 3.5e-3  # of three steps of AdamW
    assert "lr 0.001 " in (config.output / "train.log").read_text()
    with pytest.raises(ValueError, match=r"was begun with optimization.query_lr = 0.001, which cannot become None"):
        train(replace(with_optimization(config, query_lr=None), resume=True))


def test_both_are_settings_of_the_run(config):
    changed = config.with_settings(query_lr=1e-3, group_init_noise=0.1)
    assert (changed.optimization.query_lr, changed.model.group_init_noise) == (1e-3, 0.1)
