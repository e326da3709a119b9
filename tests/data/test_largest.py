"""How large augmented images can become, against the augmentation itself."""

import pytest
import torch
from torchvision import tv_tensors

from groupdetr_fast.data import AugmentationConfig, train_transforms
from groupdetr_fast.data.largest import largest_training_size

SIZES = torch.tensor([[60, 90], [100, 40], [64, 64]])
SMALL = {"short_sides": (40, 56), "crop_short_sides": (40, 50), "crop_min": 24, "crop_max": 44}


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(**SMALL, max_size=90),
        AugmentationConfig(**SMALL, max_size=None),
        AugmentationConfig(**SMALL, max_size=90, crop=0.0),
        AugmentationConfig(**SMALL, max_size=None, crop=0.0),
        AugmentationConfig(**SMALL, square=True),
        AugmentationConfig(jitter_size=48),
    ],
)
def test_no_image_is_larger_and_some_are_as_large(config):
    transform = train_transforms(config)
    largest = [0, 0]
    for index in range(300):
        height, width = SIZES[index % 3].tolist()
        corners = torch.tensor([[0.0, 0, width, height]])
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        image, _ = transform(image, {"boxes": boxes, "labels": torch.tensor([0])})
        largest = [max(a, b) for a, b in zip(largest, image.shape[1:], strict=True)]
    expected = largest_training_size(config, SIZES)
    assert all(found <= limit <= 1.2 * found for found, limit in zip(largest, expected, strict=True))


def test_own_transforms_make_any_shape():
    config = AugmentationConfig(**SMALL, max_size=90, transforms="mine.py:build")
    assert largest_training_size(config, SIZES) == (90, 90)
