"""Several batches per optimiser step are one large batch."""

from dataclasses import replace

import pytest
import torch
from small_runs import small_config, write_images
from test_passes import MASKS, small_batch, small_model

import groupdetr_fast as gd
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.losses import mask_criterion
from groupdetr_fast.runs.train import train
from groupdetr_fast.targets import StepTotals


def losses_and_gradients(model, criterion, batches):
    """Of images ``[4, 3, H, W]`` and their targets in these parts, as slices of the images."""
    batch = small_batch(3, 1, 0, 2, masks=hasattr(criterion, "num_points"))
    model.zero_grad()
    parts = []
    for rows in batches:
        of_images = range(4)[rows]
        targets = []
        for image in of_images:
            size = batch.targets.sizes[image]
            target = {"labels": batch.targets.labels[image, :size], "boxes": batch.targets.boxes[image, :size]}
            if batch.targets.masks is not None:
                target["masks"] = batch.targets.masks[image]
            targets.append(target)
        parts.append((rows, gd.PackedTargets.from_list(targets)))
    totals = StepTotals.of([targets for _, targets in parts])
    sums = {}
    for rows, targets in parts:
        losses = criterion(model(batch.images[rows], batch.masks[rows], targets), targets, totals)
        losses["loss"].backward()
        sums = {name: sums.get(name, 0) + value.item() for name, value in losses.items()}
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["conditional_detr_r50", "dab_detr_r50", "mask2former_r50"])
@pytest.mark.parametrize("batches", [[slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]])
def test_losses_and_gradients_are_those_of_the_large_batch(name, batches, monkeypatch):
    masks = name.startswith("mask")
    model = small_model(name, **(MASKS if masks else {}))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # batch statistics are of the small batches
    line = torch.linspace(0.1, 0.9, MASKS["loss_points"])
    monkeypatch.setattr(mask_criterion, "uncertain_points", lambda logits, *_: line[:, None].repeat(len(logits), 1, 2))
    criterion = gd.build_criterion(model)
    expected_losses, expected = losses_and_gradients(model, criterion, [slice(0, 4)])
    losses, found = losses_and_gradients(model, criterion, batches)
    tolerance = 1e-4 if masks else 1e-7  # the criterion of masks computes in float32
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6 if masks else 1e-9)


def test_a_run_with_accumulation_has_the_losses_of_one_with_large_batches(tmp_path):
    config = small_config(write_images(tmp_path), tmp_path / "large")
    config = replace(
        config,
        # Frozen norms, and neither dropout, noise nor augmentation: what is computed of an image depends on it alone.
        model=replace(config.model, model="conditional_detr_r50", dropout=0.0, backbone="resnet18", backbone_stages=2),
        augmentation=AugmentationConfig(short_sides=(32,), flip=0.0, crop=0.0, eval_short_side=32),
        optimization=replace(config.optimization, epochs=2, batch_size=4),
    )
    few = replace(config.optimization, batch_size=2, accumulate=2)
    large, accumulated = train(config), train(replace(config, optimization=few, output=tmp_path / "accumulated"))
    for first, second in zip(large["epochs"], accumulated["epochs"], strict=True):
        assert second["train"] == pytest.approx(first["train"], rel=1e-4)
