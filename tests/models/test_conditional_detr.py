"""Conditional DETR: published sizes, equality with transformers, and groups that never see each other."""

import pytest
import torch

import groupdetr_fast as gd

SMALL = {
    "num_queries": 6,
    "d_model": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dim_feedforward": 48,
    "backbone": "conv:8-16-16",
}


def small_model(num_groups=3, **overrides):
    torch.manual_seed(1)
    model = gd.build_model("conditional_detr_r50", num_classes=5, num_groups=num_groups, **{**SMALL, **overrides})
    # The box head starts at zero, which would hide what its inputs depend on.
    for parameter in model.bbox_embed.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():  # batch statistics would tie the images of a batch together, as they should
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def padded_batch(size=(48, 64)):
    images = torch.randn(2, 3, *size)
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[1, 40:] = True
    masks[1, :, 48:] = True
    return images.masked_fill(masks[:, None], 0), masks


@pytest.mark.parametrize("name", ["conditional_detr_r50", "conditional_detr_r50_dc5"])
def test_parameter_count_is_the_published_one(name):
    model = gd.build_model(name, num_classes=91, num_groups=1)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 43.42


def test_dc5_halves_the_stride():
    images = torch.randn(1, 3, 64, 64)
    sizes = {}
    for name in ("conditional_detr_r50", "conditional_detr_r50_dc5"):
        sizes[name] = gd.build_model(name, num_classes=2, num_groups=1).backbone(images)[-1].shape
    assert sizes["conditional_detr_r50"] == (1, 2048, 2, 2)
    assert sizes["conditional_detr_r50_dc5"] == (1, 2048, 4, 4)


def test_defaults_are_the_published_ones():
    model = gd.build_model("conditional_detr_r50", num_classes=91, num_groups=11)
    config = model.config
    assert (config.num_queries, config.d_model, config.num_heads, config.dim_feedforward) == (300, 256, 8, 2048)
    assert (config.encoder_layers, config.decoder_layers, config.dropout) == (6, 6, 0.1)
    assert model.query_embed.weight.shape == (3300, 256)
    assert torch.allclose(model.class_embed.bias.sigmoid(), torch.full((91,), 0.01))
    assert not model.bbox_embed.layers[-1].weight.any()
    assert model.decoder.layers[0].ca_qpos_proj is not None
    assert model.decoder.layers[1].ca_qpos_proj is None
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def outputs(out):
    return torch.cat((out.logits, out.boxes), dim=-1)


def forwards(model, images, masks):
    """The model in training mode, and in evaluation mode with an explicit number of groups."""
    torch.manual_seed(2)
    yield "train", model(images, masks)
    for module in model.modules():
        module.eval()
    yield "eval", model(images, masks, num_groups=model.config.num_groups)


def test_no_gradient_between_groups_or_images():
    model = small_model(num_groups=3, dropout=0.1)
    images, masks = padded_batch()
    images.requires_grad_()
    size = SMALL["num_queries"]
    for mode, out in forwards(model, images, masks):
        assert out.groups == gd.QueryGroups(3, size), mode
        for image in range(2):
            for group in range(3):
                rows = slice(group * size, (group + 1) * size)
                # A random weighting: the sum of a layer norm's outputs would have no gradient at all.
                output = outputs(out)[:, image, rows]
                loss = (output * torch.randn_like(output)).sum()
                image_grad, query_grad = torch.autograd.grad(
                    loss, (images, model.query_embed.weight), retain_graph=True
                )
                assert image_grad[image].abs().max() > 0, mode
                assert not image_grad[1 - image].any(), f"{mode}: image {1 - image} leaks into image {image}"
                grad = query_grad.unflatten(0, (3, size))
                assert grad[group].abs().max() > 0, mode
                others = [g for g in range(3) if g != group]
                assert not grad[others].any(), f"{mode}: other groups leak into group {group}"


def test_groups_together_equal_groups_apart():
    model = small_model(num_groups=3)
    images, masks = padded_batch()
    model.eval()
    together = outputs(model(images, masks, num_groups=3)).chunk(3, dim=2)
    for group in range(3):
        apart = outputs(model(images, masks, inference_group=group))
        torch.testing.assert_close(together[group], apart, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_one_group_is_the_base_model():
    """Group 0 of a grouped model computes what a model with one group and the same weights computes."""
    grouped, base = small_model(num_groups=3), small_model(num_groups=1)
    state = grouped.state_dict()
    state["query_embed.weight"] = state["query_embed.weight"][: SMALL["num_queries"]]
    base.load_state_dict(state)
    images, masks = padded_batch()
    grouped.eval()
    expected = outputs(base.eval()(images, masks, num_groups=1))
    assert torch.equal(outputs(grouped(images, masks)), expected)
    assert grouped(images, masks).groups == gd.QueryGroups(1, SMALL["num_queries"])


def test_unpadded_batch_needs_no_mask():
    model = small_model().eval()
    images = torch.randn(2, 3, 48, 64)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    torch.testing.assert_close(outputs(model(images)), outputs(model(images, masks)), rtol=1e-5, atol=1e-5)


def test_input_norm_gives_large_features_unit_scale():
    images = torch.randn(1, 3, 48, 64)
    spread = {}
    for input_norm in (True, False):
        model = small_model(input_norm=input_norm, encoder_layers=0).eval()
        with torch.no_grad():
            for parameter in model.input_proj.parameters():
                parameter.mul_(1e3)
            spread[input_norm] = model._encode(images, None).tokens.std().item()
    assert spread[True] == pytest.approx(1, abs=0.05)
    assert spread[False] > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 4}, r"num_groups must be in \[1, 3\]"),
        ({"num_groups": 0}, r"num_groups must be in \[1, 3\]"),
        ({"inference_group": 3}, r"inference_group must be in \[0, 3\)"),
    ],
)
def test_impossible_groups_are_refused(arguments, message):
    model = small_model(num_groups=3).eval()
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 32, 32), **arguments)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("detr_r50", {}, "unknown model 'detr_r50'; the models are conditional_detr_r50"),
        ("conditional_detr_r50", {"queries": 3}, "has no setting 'queries'"),
        ("conditional_detr_r50", {"d_model": 36}, "d_model must be a multiple of 4 and of num_heads=8"),
        ("conditional_detr_r50", {"num_queries": 0}, "num_queries must be at least 1"),
        ("conditional_detr_r50", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        gd.build_model(name, num_classes=2, num_groups=1, **overrides)
