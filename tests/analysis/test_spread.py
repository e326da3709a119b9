import pytest
import torch

import groupdetr_fast as gd
from groupdetr_fast.analysis.spread import spread_of_queries
from groupdetr_fast.data import Batch

SIZES = {"d_model": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 32}
BACKBONES = {
    "conditional_detr_r50": "conv:8-8",
    "dab_detr_r50": "conv:8-8",
    "dn_detr_r50": "conv:8-8",
    "dab_deformable_detr_r50": "conv:8-8-8",
    "dino_4scale_r50": "conv:8-8-8",
}


def small(name, num_queries=4):
    torch.manual_seed(0)
    model = gd.build_model(
        name, num_classes=3, num_groups=2, num_queries=num_queries, backbone=BACKBONES[name], dropout=0.1, **SIZES
    )
    return model, gd.build_criterion(model)


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    objects = [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.4)}] * count
    pixels = torch.randn(count, 3, 32, 64, generator=generator)
    sizes = torch.tensor([[32, 64]] * count)
    padding = torch.zeros(count, 32, 64, dtype=torch.bool)
    return Batch(pixels, padding, gd.PackedTargets.from_list(objects), list(range(count)), sizes)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_detector_of_boxes_is_measured_and_left_as_it_was(name):
    model, criterion = small(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = spread_of_queries(model, criterion, [images(2, seed=0), images(1, seed=1)])
    assert all(value > 0 for key, value in found.items() if key != "box_images")
    assert found["content_first"] < 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert spread_of_queries(model, criterion, [images(2, seed=0), images(1, seed=1)]) == found  # without dropout


def test_the_numbers_are_those_of_a_loop():
    model, criterion = small("dab_detr_r50")
    with torch.no_grad():
        model.bbox_embed.layers[-1].weight.normal_()
    batch = images(3, seed=0)
    contents = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda layer, inputs, output: contents.append(output))
    found = spread_of_queries(model, criterion, [batch])
    contents.clear()
    model.eval()
    for module in model.backbone.modules():
        module.train()
    with torch.no_grad():
        boxes = model(batch.images, batch.masks).boxes[-1]
        tokens = model.encode(batch.images, batch.masks).tokens
    for content, name in zip(contents, ("content_first", "content_last"), strict=True):
        apart = [(query - image.mean(0)).square().sum() for image in content for query in image]
        long = [query.square().sum() for image in content for query in image]
        assert found[name] == pytest.approx((sum(apart) / sum(long)).sqrt().item(), rel=1e-5)
    last = contents[-1]
    apart = [(image[q] - last[:, q].mean(0)).square().sum() for image in last for q in range(4)]
    assert found["content_images"] == pytest.approx((sum(apart) / last.square().sum()).sqrt().item(), rel=1e-5)
    apart = sum((image - tokens.mean(0)).square().sum() for image in tokens)
    assert found["memory_images"] == pytest.approx((apart / tokens.square().sum()).sqrt().item(), rel=1e-5)
    over_queries = [(box - image.mean(0)).square().mean() for image in boxes for box in image]
    over_images = [(image[q] - boxes[:, q].mean(0)).square().mean() for image in boxes for q in range(4)]
    assert found["box_queries"] == pytest.approx((sum(over_queries) / 12).sqrt().item(), rel=1e-5)
    assert found["box_images"] == pytest.approx((sum(over_images) / 12).sqrt().item(), rel=1e-5)


def test_a_new_dab_detr_predicts_its_anchors_whatever_the_image():
    model, criterion = small("dab_detr_r50")
    found = spread_of_queries(model, criterion, [images(3, seed=0)])
    assert found["box_images"] < 1e-6
    anchors = model.refpoint_embed.weight[:4].sigmoid()
    assert found["box_queries"] == pytest.approx((anchors - anchors.mean(0)).square().mean().sqrt().item(), rel=1e-3)


def test_a_single_query_differs_from_none():
    model, criterion = small("conditional_detr_r50", num_queries=1)
    found = spread_of_queries(model, criterion, [images(2, seed=0)])
    assert found["content_first"] == found["content_last"] == found["box_queries"] == 0
    assert found["content_images"] > 0


def test_masks_are_refused():
    torch.manual_seed(0)
    sizes = {**SIZES, "encoder_dim_feedforward": 32, "loss_points": 32, "backbone": "conv:8-8-8-8"}
    model = gd.build_model("mask2former_r50", num_classes=3, num_groups=1, num_queries=4, **sizes)
    with pytest.raises(ValueError, match="Mask2Former predicts no boxes, whose spread is measured"):
        spread_of_queries(model, gd.build_criterion(model), [images(1, seed=0)])
