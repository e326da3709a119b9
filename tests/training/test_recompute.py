import pytest
import torch
from test_passes import MODELS, small_batch, small_model

import groupdetr_fast as gd
from groupdetr_fast.testing import peak_bytes
from groupdetr_fast.training.recompute import recompute_decoder_layers


def step(model, batch):
    model.zero_grad()
    torch.manual_seed(3)
    losses = gd.build_criterion(model)(model(batch.images, batch.masks, batch.targets), batch.targets)
    losses["loss"].backward()
    return losses["loss"].item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_gradients_stay_the_same(name, overrides, dropout):
    batch = small_batch(3, 2)
    expected = step(small_model(name, **overrides, dropout=dropout), batch)
    model = small_model(name, **overrides, dropout=dropout)
    recompute_decoder_layers(model)
    assert step(model, batch)[0] == expected[0]
    torch.testing.assert_close(step(model, batch)[1], expected[1], rtol=0, atol=0)


def test_memory_falls():
    batch = small_batch(3, 2)
    settings = {"num_queries": 60, "decoder_layers": 6, "dim_feedforward": 256}
    plain, recomputed = (small_model("conditional_detr_r50", **settings) for _ in range(2))
    recompute_decoder_layers(recomputed)
    step(plain, batch)
    before, after = (peak_bytes(lambda model=model: step(model, batch)) for model in (plain, recomputed))
    print(f"MiB: {before / 2**20:.1f}, recomputed {after / 2**20:.1f}")
    assert after < 0.6 * before


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no decoder\.layers"):
        recompute_decoder_layers(torch.nn.Linear(1, 1))
