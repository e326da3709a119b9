"""Mask2Former: published sizes, the frame that it works in, and what its queries see."""

import pytest
import torch
from small_detectors import CLASSES, outputs, padded_batch, small_detector
from torch.nn import functional as F

import groupdetr_fast as gd
from groupdetr_fast.models.mask2former import MaskedCrossAttention, visible_tokens

NAME = "mask2former_r50"


def targets_with_masks(*sizes, image_size=(48, 64)):
    return gd.PackedTargets.from_list(
        [
            {
                "labels": torch.randint(CLASSES, (size,)),
                "boxes": torch.rand(size, 4),
                "masks": torch.rand(size, *image_size) < 0.3,
            }
            for size in sizes
        ]
    )


def test_parameter_count_is_the_published_one():
    model = gd.build_model(NAME, num_classes=80, num_groups=1)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 44.0


@pytest.mark.slow
def test_parameter_count_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    stages = [f"stage{stage}" for stage in (1, 2, 3, 4)]
    config = transformers.Mask2FormerConfig(backbone_config=transformers.ResNetConfig(out_features=stages))
    config.num_labels = 80
    theirs = transformers.Mask2FormerForUniversalSegmentation(config)
    # Their batch norms are trained, ours are frozen.
    expected = sum(p.numel() for name, p in theirs.named_parameters() if "normalization" not in name)
    assert sum(p.numel() for p in gd.build_model(NAME, num_classes=80, num_groups=1).parameters()) == expected


def test_defaults_are_the_published_ones():
    model = gd.build_model(NAME, num_classes=80, num_groups=11)
    config = model.config
    assert (config.num_queries, config.d_model, config.num_heads, config.dim_feedforward) == (100, 256, 8, 2048)
    assert (config.encoder_layers, config.encoder_dim_feedforward, config.decoder_layers) == (6, 1024, 9)
    assert config.dropout == 0
    assert model.query_feat.weight.shape == model.query_embed.weight.shape == (1100, 256)
    assert model.class_embed.out_features == 81
    assert all(p.requires_grad for p in model.parameters())
    criterion = gd.build_criterion(model)
    assert criterion.weights == {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    matcher = criterion.matcher
    assert (matcher.class_cost, matcher.mask_cost, matcher.dice_cost) == (2.0, 5.0, 5.0)
    assert (matcher.num_points, criterion.num_points, criterion.no_object_weight) == (12544, 12544, 0.1)
    assert (criterion.oversample_ratio, criterion.importance_ratio) == (3.0, 0.75)


def test_output_has_the_learned_queries_and_every_layer():
    model = small_detector(NAME)
    images, masks = padded_batch()
    out = model(images, masks)
    assert out.logits.shape == (3, 2, 18, CLASSES + 1)
    assert out.mask_embeddings.shape == (3, 2, 18, 32)
    assert out.mask_features.shape == (2, 32, 32, 32)  # 48 x 64 in a frame of 64 x 64, at stride 2
    first = model.decoder.norm(model.query_feat.weight)
    torch.testing.assert_close(out.logits[0, 0], model.class_embed(first))


def test_images_are_padded_to_a_multiple_of_32():
    model = small_detector(NAME).eval()
    images, masks = torch.randn(2, 3, 50, 70), torch.zeros(2, 50, 70, dtype=torch.bool)
    masks[1, 30:] = True
    out = model(images, masks)
    padded = model(F.pad(images, (0, 26, 0, 14)))
    assert torch.equal(outputs(out), outputs(padded))
    assert out.padding.shape == (2, 64, 96)
    assert (~out.padding).sum((1, 2)).tolist() == [50 * 70, 30 * 70]
    assert not padded.padding.any()


def test_queries_see_what_the_interpolated_masks_hold():
    embeddings, features = torch.randn(2, 7, 8), torch.randn(2, 8, 24, 32)
    embeddings[0, 3] = 0  # a mask of zeros only is everywhere at its threshold
    features[1] = features[1].abs() + 0.1
    embeddings[1, 5] = -1  # an empty mask
    logits = F.interpolate(torch.einsum("bqd,bdhw->bqhw", embeddings, features), (6, 8), mode="bilinear")
    expected = logits.flatten(2).sigmoid() >= 0.5
    expected[expected.sum(-1) == 0] = True
    visible = visible_tokens(embeddings, F.interpolate(features, (6, 8), mode="bilinear").flatten(2))
    assert torch.equal(visible, expected)
    assert visible[1, 5].all()
    assert 0.2 < visible[0].float().mean() < 0.8


def test_masked_attention_is_that_of_torch_with_the_mask_repeated_over_heads():
    ours, theirs = MaskedCrossAttention(32, 4, 0.0), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 6, 32), torch.randn(2, 20, 32), torch.randn(2, 20, 32)
    visible = torch.rand(2, 6, 20) < 0.4
    visible[..., 0] = True
    expected, _ = theirs(query, key, value, attn_mask=~visible.repeat_interleave(4, dim=0))
    torch.testing.assert_close(ours(query, key, value, visible), expected)


def test_bfloat16_autocast_trains():
    model = small_detector(NAME)
    images, masks = padded_batch()
    targets = targets_with_masks(3, 1)
    criterion = gd.build_criterion(model)
    expected = model(images, masks)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, masks)
        losses = criterion(out, targets)
    # Only the learned queries: the layers after them see other tokens where a mask is near its threshold.
    for got, wanted in ((out.logits[0], expected.logits[0]), (out.mask_features, expected.mask_features)):
        assert (got - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    assert {value.dtype for value in losses.values()} == {torch.float32}
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_few_steps_lower_the_losses():
    torch.manual_seed(0)
    model = small_detector(NAME)
    criterion = gd.build_criterion(model)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, 5:25, 5:30], masks[1, 28:44, 34:60] = True, True
    images = torch.zeros(2, 3, 48, 64)
    images[:, 0, masks[0]], images[:, 1, masks[1]] = 2, 2
    target = {"labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4), "masks": masks}
    targets = gd.PackedTargets.from_list([target, target])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        losses = criterion(model(images), targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    for name in ("loss_ce", "loss_mask", "loss_dice"):
        assert history[-1][name] < 0.5 * history[0][name], name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss_points": 0}, "loss_points must be at least 1"),
        ({"oversample_ratio": 0.5}, "oversample_ratio must be at least 1"),
        ({"importance_ratio": 1.5}, r"importance_ratio must be in \[0, 1\]"),
        ({"num_levels": 0}, "num_levels must be at least 1"),
        ({"l1_loss": 5.0}, "mask2former_r50 has no setting 'l1_loss'"),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        gd.build_model(NAME, num_classes=2, num_groups=1, **overrides)
