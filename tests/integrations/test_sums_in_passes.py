"""Sums in passes against the same sums at once, without any detector."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from groupdetr_fast.integrations.passes import sum_in_passes

WEIGHTS = (0.5, 2.0)
PASSES = range(3)


@pytest.fixture
def shared():
    """Features, of which one has no gradient; a parameter of each pass, one of all and one of none; all leaves."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(7)]
    tensors[1].requires_grad_(False)
    return [tensors[0] * 2, tensors[1]], tensors[2:], tensors


def run_with(parameters):
    def run(index, features):
        own, common = parameters[index], parameters[3]
        values = [(features[0] * own * common).sin().sum(), (features[1] + own).square().sum()]
        return torch.stack(
            [torch.stack((value, value.new_full((), w))) for value, w in zip(values, WEIGHTS, strict=True)]
        )

    return run


def weighted(values):
    return sum(weight * value for weight, value in zip(WEIGHTS, values.unbind(), strict=True))


@pytest.mark.parametrize("factor", [1.0, -3.0])
@pytest.mark.parametrize("start", [1.0, 512.0, torch.tensor(0.25, dtype=torch.float64)], ids=str)
def test_values_and_gradients(shared, start, factor):
    features, parameters, leaves = shared
    run = run_with(parameters)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    at_once = sum(run(index, features)[:, 0] for index in PASSES)
    expected = torch.autograd.grad(factor * weighted(at_once), trained, allow_unused=True, retain_graph=True)
    values = sum_in_passes(run, PASSES, features, parameters, start=start)
    torch.testing.assert_close(values, at_once)
    found = torch.autograd.grad(factor * weighted(values), trained, allow_unused=True)
    assert found[-1] is None  # of the parameter that is not used
    torch.testing.assert_close(found[:-1], expected[:-1])


def test_gradients_reach_only_leaves(shared):
    """The passes themselves leave ``grad`` alone, and what watches parameters sees one gradient of the whole step."""
    features, parameters, _ = shared
    seen = []
    parameters[3].register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    values = sum_in_passes(run_with(parameters), PASSES, features, parameters)
    assert all(parameter.grad is None for parameter in parameters)
    weighted(values).backward()
    assert len(seen) == 1


def test_activations_are_forgotten_before_the_next_pass(shared):
    features, parameters, _ = shared
    run, activations = run_with(parameters), []

    def watched(index, cut):
        assert all(activation.expired() for activation in activations)
        activation = torch.ones(4, dtype=torch.float64, requires_grad=True) * 1
        activations.append(StorageWeakRef(activation.untyped_storage()))
        return run(index, cut) * activation.square().mean()

    sum_in_passes(watched, PASSES, features, parameters)
    assert len(activations) == 3


def test_one_backward_pass(shared):
    features, parameters, _ = shared
    loss = weighted(sum_in_passes(run_with(parameters), PASSES, features, parameters))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a step in passes has one backward pass"):
        loss.backward()


def test_without_gradients(shared, monkeypatch):
    features, parameters, _ = shared
    expected = sum_in_passes(run_with(parameters), PASSES, features, parameters)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        torch.testing.assert_close(sum_in_passes(run_with(parameters), PASSES, features, parameters), expected.detach())
    with pytest.raises(TypeError):
        sum_in_passes(run_with(parameters), PASSES, features, parameters)
