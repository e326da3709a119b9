"""DAB-DETR: published sizes and settings, and equality with transformers. What it does with groups is tested in
test_groups_of_detectors.py."""

import pytest
import torch
from small_detectors import padded_batch, small_detector

import groupdetr_fast as gd


@pytest.mark.parametrize("name", ["dab_detr_r50", "dab_detr_r50_dc5"])
def test_parameter_count_is_that_of_the_original(name):
    model = gd.build_model(name, num_classes=91, num_groups=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_671_517
    # the original file has 590 tensors, because it repeats the box head under transformer.decoder
    assert len(model.state_dict()) + len(model.bbox_embed.state_dict()) == 590


def test_defaults_are_the_published_ones():
    model = gd.build_model("dab_detr_r50", num_classes=91, num_groups=11)
    config = model.config
    assert (config.num_queries, config.d_model, config.num_heads, config.dim_feedforward) == (300, 256, 8, 2048)
    assert (config.encoder_layers, config.decoder_layers, config.dropout) == (6, 6, 0.0)
    assert (config.class_cost, config.l1_cost, config.giou_cost) == (2, 5, 2)
    assert (config.class_loss, config.l1_loss, config.giou_loss) == (1, 5, 2)
    assert config.position_temperature == 20
    assert model.refpoint_embed.weight.shape == (3300, 4)
    assert torch.allclose(model.class_embed.bias.sigmoid(), torch.full((91,), 0.01))
    assert not model.bbox_embed.layers[-1].weight.any()
    assert isinstance(model.encoder.layers[0].activation, torch.nn.PReLU)
    assert isinstance(model.decoder.layers[5].activation, torch.nn.PReLU)
    assert gd.build_model("dab_detr_r50_dc5", num_classes=2, num_groups=1).config.dilation


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.DabDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            out_features=["stage4"],
            layer_type="basic",
        ),
        hidden_size=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=10,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_labels=7,
        dropout=0.0,
        auxiliary_loss=True,
    )
    torch.manual_seed(0)
    model = transformers.DabDetrForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():
        if "backbone" in name or "query_refpoint" in name:
            continue
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" not in name:
            torch.nn.init.uniform_(parameter, -0.3, 0.3)
    return model


def ours_with_weights_of(theirs, **overrides):
    model = gd.build_model(
        "dab_detr_r50",
        num_classes=7,
        num_groups=1,
        num_queries=10,
        d_model=64,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        dim_feedforward=96,
        backbone="resnet18",
        **overrides,
    )
    report = gd.load_checkpoint(model, theirs.state_dict())
    assert not report.missing
    return model


def test_outputs_and_gradients_equal_transformers(theirs):
    """Gradients too: a box reaches back to the layer before through the anchor it is added to, attention does not."""
    ours = ours_with_weights_of(theirs)
    images, masks = padded_batch((96, 128))
    expected = theirs(pixel_values=images, pixel_mask=(~masks).long())
    out = ours.eval()(images, masks)
    assert expected.pred_boxes.std() > 0.05  # the comparison would mean little if all boxes were alike
    torch.testing.assert_close(out.logits[-1], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.boxes[-1], expected.pred_boxes, rtol=0, atol=1e-4)

    weight = torch.randn_like(expected.pred_boxes)
    (weight * expected.pred_boxes).sum().backward()
    (weight * out.boxes[-1]).sum().backward()
    pairs = [
        (theirs.bbox_predictor.layers[0].weight, ours.bbox_embed.layers[0].weight),
        (theirs.model.query_refpoint_embeddings.weight, ours.refpoint_embed.weight),
        (theirs.model.decoder.query_scale.layers[0].weight, ours.decoder.query_scale.layers[0].weight),
        (theirs.model.encoder.query_scale.layers[0].weight, ours.encoder.query_scale.layers[0].weight),
        (theirs.model.encoder.layers[0].activation_fn.weight, ours.encoder.layers[0].activation.weight),
    ]
    for a, b in pairs:
        assert a.grad.abs().max() > 0
        assert (a.grad - b.grad).norm() < 1e-3 * a.grad.norm()


def test_position_temperature_is_that_of_the_image_alone(theirs):
    images, masks = padded_batch((96, 128))
    hot = ours_with_weights_of(theirs, position_temperature=10000.0).eval()
    default = ours_with_weights_of(theirs).eval()
    positions = [model.encode(images, masks).position for model in (hot, default)]
    assert (positions[0] - positions[1]).abs().max() > 0.1
    assert (hot(images, masks).boxes - default(images, masks).boxes).abs().max() > 1e-4


def test_targets_make_no_denoising_queries():
    model = small_detector("dab_detr_r50")
    images, masks = padded_batch()
    targets = gd.PackedTargets.from_list([{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2)
    assert model(images, masks, targets).denoising is None
