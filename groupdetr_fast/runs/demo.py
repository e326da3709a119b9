"""The run of ``make demo``, whose detector and data are also the defaults of ``groupdetr analyze``."""

from dataclasses import replace
from pathlib import Path

from ..data import AugmentationConfig, DigitsConfig, digits_dataset
from ..data.config import DataConfig
from ..training.config import OptimizationConfig
from .config import CocoTrainingConfig, ModelConfig

__all__ = ["digits_demo", "with_digits"]

DIGITS = DigitsConfig(image_size=64, min_digit=14, max_digit=36, max_objects=5)


def digits_demo(*, compose: bool = True) -> CocoTrainingConfig:
    """A small Conditional DETR with groups on the embedded digits, minutes on two CPU cores.

    Args:
        compose: find the data set, composing it on first use; without, the configuration names no files.
    """
    data = DataConfig(workers=0, cache_images=True)
    size = DIGITS.image_size
    return CocoTrainingConfig(
        data=with_digits(data) if compose else data,
        model=ModelConfig(
            num_groups=5,
            num_queries=15,
            d_model=128,
            num_heads=4,
            encoder_layers=1,
            decoder_layers=3,
            dim_feedforward=256,
            dropout=0.0,
            backbone="conv:32-64-128",
        ),
        # a mirrored digit is another character
        augmentation=AugmentationConfig(
            short_sides=(size,), flip=0.0, crop=0.0, eval_short_side=size, max_size=None, eval_max_size=None
        ),
        optimization=OptimizationConfig(
            epochs=15, decay="cosine", warmup_steps=100, lr=1e-3, backbone_lr=1e-3, batch_size=16
        ),
        output=Path("runs/demo"),
        evaluate_every=5,
    )


def with_digits(data: DataConfig) -> DataConfig:
    """The same settings with the data set of the demo, which is composed on first use."""
    return replace(data, **digits_dataset(config=DIGITS)._asdict())
