import pytest
import torch

from groupdetr_fast.training.ema import AveragedWeights


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def change(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1) if tensor.dtype == torch.int64 else tensor.copy_(torch.randn_like(tensor))


def test_the_average_is_that_of_a_plain_loop(model):
    average = AveragedWeights(model, 0.5)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(12):
        change(model)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in average.average.items():
        if tensor.dtype == torch.int64:
            assert tensor == 12
        else:
            torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-6, atol=1e-6)


def test_the_model_has_the_average_only_for_a_while(model):
    average = AveragedWeights(model, 0.9)
    change(model)
    average.update()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in average.average.items()}
    with average.in_model():
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in average.average.items())


def test_restarting_copies(model):
    average = AveragedWeights(model, 0.9)
    given = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    average.restart(given, 100)
    change(model)
    average.update()
    assert all(not tensor.any() for tensor in given.values())
    torch.testing.assert_close(average.average["0.weight"], 0.1 * model[0].weight.detach())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_buffers_of_every_kind_follow(dtype):
    model = torch.nn.Linear(1, 1)
    model.register_buffer("kept", torch.zeros(3, dtype=dtype))
    average = AveragedWeights(model, 0.0)
    model.kept.copy_(torch.tensor([1, 0, 1]))
    average.update(unless=torch.tensor(True))
    assert not average.average["kept"].any()
    assert average.updates == 0
    average.update(unless=torch.tensor(False))
    average.update()
    assert torch.equal(average.average["kept"], model.kept)
    assert average.updates == 2
