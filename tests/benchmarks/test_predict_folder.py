"""The three ways of the benchmark find the same, and images of similar size pad less."""

import pytest
import torch
from PIL import Image

import groupdetr_fast as gd
from cpu.predict_folder import AHEAD, BY_SIZE, IN_ORDER, Counted, compare, ways_to_predict
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.prediction import InferenceSettings


def test_ways_to_predict(tmp_path):
    for number in range(16):
        size = ((64, 48), (48, 64))[number % 2]
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number:02}.png")
    model = gd.build_model(
        "conditional_detr_r50",
        num_classes=3,
        num_groups=1,
        num_queries=5,
        d_model=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        dim_feedforward=16,
        backbone="conv:8-16",
    )
    counted = Counted(model.eval())
    settings = InferenceSettings(augmentation=AugmentationConfig(eval_short_side=48, eval_max_size=None))
    found, padding = {}, {}
    for way, run in ways_to_predict(counted, settings, sorted(tmp_path.iterdir())).items():
        counted.pixels = counted.padding = 0
        found[way] = run()
        padding[way] = counted.padding / counted.pixels
    compare(found, tolerance=0.02)
    assert len(found[IN_ORDER]) == 16
    assert padding[IN_ORDER] == pytest.approx(0.25)
    assert padding[BY_SIZE] == padding[AHEAD] == 0
    found[AHEAD][3] = {**found[AHEAD][3], "scores": found[AHEAD][3]["scores"] + 0.1}
    with pytest.raises(AssertionError):
        compare(found, tolerance=0.02)
