"""A small run on the digits, without pictures and curves, which would take longer than the training."""

import pytest
from small_sizes import SIZES

from groupdetr_fast.data import AugmentationConfig, DigitsConfig, digits_dataset
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.training.config import OptimizationConfig


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=10, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)


@pytest.fixture
def config(digits, tmp_path):
    return CocoTrainingConfig(
        data=DataConfig(**digits._asdict(), workers=0),
        model=ModelConfig(num_groups=2, dropout=0.1, **{**SIZES, "decoder_layers": 2}),
        augmentation=AugmentationConfig(
            short_sides=(40, 48), crop_short_sides=(48,), crop_min=24, crop_max=48, flip=0.5, eval_short_side=48
        ),
        optimization=OptimizationConfig(epochs=3, lr_drop=(2,), lr=1e-3, backbone_lr=1e-3, batch_size=4),
        output=tmp_path / "run",
        pictures=0,
        report=False,
        track=(),
    )
