"""Half precision on the CPU: autocast computes nearly what float32 does, and is refused where it would do nothing."""

from dataclasses import replace

import pytest
import torch
from small_runs import small_config, write_images
from test_passes import MODELS, small_batch, small_model

import groupdetr_fast as gd
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import setup
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.engine import build_accelerator
from groupdetr_fast.training.setup import do_without_cudnn_attention, round_products


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


@pytest.mark.parametrize(
    ("given", "launched", "taken"),
    [
        (None, None, "no"),
        (None, "no", "no"),  # of accelerate launch without the flag
        (None, "bf16", "bf16"),
        ("bf16", "bf16", "bf16"),
        ("bf16", "no", "bf16"),
        ("bf16", None, "bf16"),
    ],
)
def test_the_precision_of_accelerate_launch_is_taken_where_none_is_given(tmp_path, monkeypatch, given, launched, taken):
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    accelerator = build_accelerator(OptimizationConfig(precision=given), tmp_path, cpu=True)
    assert accelerator.mixed_precision == taken


@pytest.mark.parametrize(
    ("given", "launched", "message"),
    [
        ("no", "bf16", "precision is no in this run and bf16 for accelerate launch"),
        ("bf16", "fp16", "precision is bf16 in this run and fp16 for accelerate launch"),
        (None, "fp8", "accelerate launch asks for fp8: train with bf16, fp16 or no"),
    ],
)
def test_two_precisions_are_refused(tmp_path, monkeypatch, given, launched, message):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=message):
        build_accelerator(OptimizationConfig(precision=given), tmp_path, cpu=True)


def test_a_run_writes_down_the_precision_that_it_was_launched_with(tmp_path, monkeypatch):
    config = small_config(write_images(tmp_path), tmp_path / "run")
    config = replace(config, optimization=replace(config.optimization, epochs=1))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(config)["optimization"]["precision"] == "bf16"
    assert from_yaml(CocoTrainingConfig, config.output / "config.yaml").optimization.precision == "bf16"


@pytest.fixture
def float32_products():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_products_are_rounded_to_tf32_on_gpus_where_asked(float32_products):
    torch.set_float32_matmul_precision("highest")
    round_products(torch.device("cpu"), tf32=True)
    assert torch.get_float32_matmul_precision() == "highest"  # the same bits as ever
    for tf32, precision in ((True, "high"), (False, "highest")):
        round_products(torch.device("cuda"), tf32=tf32)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")  # what our kernels go by


def test_cudnn_attention_is_left_out_on_gpus(monkeypatch):
    choices = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", choices.append)
    do_without_cudnn_attention(torch.device("cpu"))
    assert choices == []
    do_without_cudnn_attention(torch.device("cuda"))
    assert choices == [False]


@pytest.mark.parametrize("allowed", [True, False])
def test_cudnn_attention_is_left_out_where_it_is_not_allowed(allowed, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "do_without_cudnn_attention", asked.append)
    accelerator = build_accelerator(OptimizationConfig(), tmp_path, cpu=True, cudnn_attention=allowed)
    assert asked == ([] if allowed else [accelerator.device])


def test_tf32_is_on_unless_it_is_turned_off():
    assert OptimizationConfig().tf32
