"""What a detector is called with and cannot mean is refused in one sentence, before anything is computed."""

import pytest
import torch
from small_sizes import SIZES

import groupdetr_fast as gd
from groupdetr_fast.models import model_config

IMAGES = torch.zeros(2, 3, 32, 48)
ONE_IMAGE = gd.PackedTargets.from_list([{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.4)}])


@pytest.fixture(scope="module")
def model():
    return gd.build_model("dn_detr_r50", num_classes=3, num_groups=2, **SIZES)


@pytest.mark.parametrize(
    ("images", "masks", "targets", "error", "message"),
    [
        (IMAGES[0], None, None, ValueError, r"images must have shape \[B, 3, H, W\], got \[3, 32, 48\]"),
        (IMAGES[:, :1], None, None, ValueError, r"images must have shape \[B, 3, H, W\], got \[2, 1, 32, 48\]"),
        (IMAGES.byte(), None, None, TypeError, "images must be floating point, .* got torch.uint8"),
        (IMAGES, IMAGES[:, 0], None, TypeError, "masks must be bool, True on padding, got torch.float32"),
        # which the resizing to the size of features would hide
        (IMAGES, IMAGES[:, 0, ::2].bool(), None, ValueError, r"masks must have shape \[2, 32, 48\], .* \[2, 16, 48\]"),
        (IMAGES, IMAGES[:1, 0].bool(), None, ValueError, r"masks must have shape \[2, 32, 48\], .* \[1, 32, 48\]"),
        (IMAGES, None, ONE_IMAGE, ValueError, "images are 2, but targets are of 1"),
        (IMAGES, None, [{}, {}], TypeError, "targets must be packed"),
    ],
)
def test_what_does_not_fit_is_refused(images, masks, targets, error, message, model):
    with pytest.raises(error, match=message):
        model(images, masks, targets)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_groups": 2.0}, TypeError, "num_groups must be an integer, got 2.0"),
        ({"num_classes": "3"}, TypeError, "num_classes must be an integer, got '3'"),
        ({"frozen_stages": 1.5}, TypeError, "frozen_stages must be an integer, got 1.5"),
        ({"d_model": None}, TypeError, "d_model must be an integer, got None"),
        ({"class_loss": float("nan")}, ValueError, "class_loss must not be negative and must be finite, got nan"),
        ({"giou_cost": -1.0}, ValueError, "giou_cost must not be negative and must be finite, got -1.0"),
        ({"frozen_stages": -1}, ValueError, "frozen_stages must not be negative, got -1"),
        ({"backbone_stages": 0}, ValueError, "backbone_stages must be at least 1, got 0"),
        ({"focal_alpha": float("nan")}, ValueError, r"focal_alpha must be in \[0, 1\], got nan"),
        ({"focal_gamma": -1.0}, ValueError, "focal_gamma must not be negative and must be finite, got -1.0"),
    ],
)
def test_settings_that_no_detector_has_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        gd.build_model("conditional_detr_r50", **{"num_classes": 3, "num_groups": 2, **SIZES, **settings})


@pytest.mark.parametrize("name", ["mask_cost", "dice_loss"])
def test_weights_of_masks_are_finite(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative and must be finite, got inf"):
        gd.build_model("mask2former_r50", num_classes=3, num_groups=2, **{name: float("inf")})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dn_detr_r50", {"box_noise": float("nan")}, "box_noise must not be negative and must be finite, got nan"),
        ("dab_detr_r50", {"position_temperature": 0.0}, "position_temperature must be positive and finite, got 0.0"),
        ("dino_4scale_r50", {"position_temperature": -1.0}, "position_temperature must be positive and finite"),
        ("mask2former_r50", {"no_object_weight": -1.0}, "no_object_weight must not be negative and must be finite"),
        ("mask2former_r50", {"oversample_ratio": float("nan")}, "oversample_ratio must be at least 1 and finite"),
    ],
)
def test_settings_that_a_detector_cannot_have_are_refused_before_it_is_built(name, settings, message):
    with pytest.raises(ValueError, match=message):
        model_config(name, **settings)


def test_targets_are_not_looked_at_in_evaluation(model):
    model.eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = model(images, None), model(images, None, targets=[{"labels": "no tensors"}])
    model.train()
    torch.testing.assert_close(found.logits, expected.logits)
