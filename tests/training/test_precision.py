"""Half precision on the CPU: autocast computes nearly what float32 does, and is refused where it would do nothing."""

import pytest
import torch
from test_passes import MODELS, small_batch, small_model

import groupdetr_fast as gd
from groupdetr_fast.training.engine import build_accelerator
from groupdetr_fast.training.optimization import OptimizationConfig


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("name", "overrides"), MODELS[:5])  # DINO's choice of queries jumps with rounding
def test_losses_and_gradients_are_those_of_float32(name, overrides, dtype):
    model = small_model(name, **overrides).float()
    criterion = gd.build_criterion(model)
    batch = small_batch(3, 2)
    targets = batch.targets._map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)

    def run(enabled):
        model.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = model(batch.images.float(), batch.masks, targets)
        losses = criterion(out, targets)
        (scaler.scale(losses["loss"]) if enabled else losses["loss"]).backward()
        scale = scaler.get_scale() if enabled else 1.0
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return losses["loss"].item(), torch.cat(gradients) / scale

    expected, expected_gradient = run(False)
    found, gradient = run(True)
    assert found == pytest.approx(expected, rel=0.02)
    assert torch.nn.functional.cosine_similarity(gradient, expected_gradient, dim=0) > 0.97


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here, on which fp16 works")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precision fp16 needs a GPU; on the CPU use bf16 or no"):
        build_accelerator(OptimizationConfig(precision="fp16"), tmp_path)
