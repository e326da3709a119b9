"""Weights of Hugging Face transformers, in the names of its versions 4 and 5."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from small_models import build, padded_batch, randomize

import groupdetr_fast as gd
from groupdetr_fast.models import CheckpointMismatch
from groupdetr_fast.models.checkpoints import CheckpointHeader, read_header

transformers = pytest.importorskip("transformers")

SIZES = {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_queries": 10,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_labels": 7,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}


def resnet18(*stages):
    return transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        out_features=[f"stage{stage}" for stage in stages],
        layer_type="basic",
    )


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(0)
    config = transformers.ConditionalDetrConfig(d_model=64, backbone_config=resnet18(4), **SIZES)
    return randomize(transformers.ConditionalDetrForObjectDetection(config).eval())


@pytest.fixture(scope="module")
def dab():
    torch.manual_seed(0)
    config = transformers.DabDetrConfig(hidden_size=64, backbone_config=resnet18(4), **SIZES)
    return randomize(transformers.DabDetrForObjectDetection(config).eval())


@pytest.fixture(scope="module")
def deformable():
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        d_model=64, backbone_config=resnet18(2, 3, 4), with_box_refine=True, two_stage=True, **SIZES
    )
    return randomize(transformers.DeformableDetrForObjectDetection(config).eval())


@torch.no_grad()
def assert_equal_to(theirs, ours):
    images, masks = padded_batch()
    expected = theirs(pixel_values=images, pixel_mask=(~masks).long())
    out = ours.eval()(images, masks)
    assert expected.pred_boxes.std() > 0.05  # the comparison would mean little if all boxes were alike
    torch.testing.assert_close(out.logits[-1], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.boxes[-1], expected.pred_boxes, rtol=0, atol=1e-4)


def test_a_state_dict_gives_the_same_outputs(conditional):
    ours = build()
    report = gd.load_checkpoint(ours, conditional.state_dict())
    assert (report.missing, report.dropped) == ([], [])
    assert report.layout == "transformers"
    assert_equal_to(conditional, ours)


def test_a_directory_gives_the_same_outputs(conditional, tmp_path):
    conditional.save_pretrained(tmp_path)
    ours = build(num_groups=3)
    report = gd.load_checkpoint(ours, tmp_path)
    assert (report.missing, report.groups) == ([], (1, 3))
    assert_equal_to(conditional, ours)


# (pattern, replacement) from transformers 5 to 4, as the published checkpoints are named
_TRANSFORMERS_4 = (
    (r"\Amodel\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"decoder\.layers\.(\d+)\.self_attn\.([qk])_(content|pos)_proj", r"decoder.layers.\1.sa_\2\3_proj"),
    (r"decoder\.layers\.(\d+)\.self_attn\.v_proj", r"decoder.layers.\1.sa_v_proj"),
    (r"decoder\.layers\.(\d+)\.encoder_attn\.([qk])_(content|pos)_proj", r"decoder.layers.\1.ca_\2\3_proj"),
    (r"decoder\.layers\.(\d+)\.encoder_attn\.(v|q_pos_sine)_proj", r"decoder.layers.\1.ca_\2_proj"),
    (r"ca_q_pos_sine_proj", "ca_qpos_sine_proj"),
)


def test_names_of_version_4_load(conditional):
    state = {}
    for key, tensor in conditional.state_dict().items():
        for pattern, replacement in _TRANSFORMERS_4:
            key = re.sub(pattern, replacement, key)
        state[key] = tensor
    assert "model.decoder.layers.1.sa_qcontent_proj.weight" in state
    ours = build()
    report = gd.load_checkpoint(ours, state)
    assert (report.missing, report.dropped) == ([], [])
    assert_equal_to(conditional, ours)


def test_dab_detr_gives_the_same_outputs(dab, tmp_path):
    """From a directory, in which the box head that two modules share is saved once, and from a state dict."""
    dab.save_pretrained(tmp_path)
    for source, repeated in ((tmp_path, 0), (dab.state_dict(), 6)):
        ours = build("dab_detr_r50", num_groups=2)
        report = gd.load_checkpoint(ours, source)
        assert (report.missing, report.dropped, report.groups) == ([], [], (1, 2))
        assert len(report.repeated) == repeated
        assert_equal_to(dab, ours)


@pytest.mark.parametrize("name", ["dab_deformable_detr_r50", "dino_4scale_r50"])
def test_deformable_detr_gives_what_it_shares(deformable, name):
    ours = build(name, num_groups=2)
    with pytest.raises(
        CheckpointMismatch, match=r"looks like one of two-stage Deformable DETR\); it lacks .* and \d+ more; "
    ):
        gd.load_checkpoint(ours, deformable.state_dict())
    report = gd.load_checkpoint(ours, deformable.state_dict(), partial=True)
    shared = ("backbone.", "input_proj.", "level_embed", "encoder.", "decoder.layers.")
    assert {key for key in ours.state_dict() if key.startswith(shared)} <= set(report.matched)
    assert set(report.matched) | set(report.missing) == set(ours.state_dict())
    assert report.groups is None  # its queries are of another kind
    source, layer = deformable.model.decoder.layers[1], ours.decoder.layers[1]
    attention = source.self_attn
    joined = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
    assert torch.equal(layer.self_attn.in_proj_weight, joined)
    assert torch.equal(layer.norm2.weight, source.self_attn_layer_norm.weight)
    assert torch.equal(layer.norm1.weight, source.encoder_attn_layer_norm.weight)
    assert torch.equal(layer.norm3.weight, source.final_layer_norm.weight)
    assert torch.equal(layer.cross_attn.value_proj.weight, source.encoder_attn.value_proj.weight)
    if name == "dino_4scale_r50":
        assert torch.equal(ours.enc_output.weight[:64], deformable.model.enc_output.weight)


@pytest.mark.parametrize("name", ["conditional", "dab"])
def test_a_directory_says_which_detector_it_is_of_and_how_large(name, tmp_path, request):
    theirs = request.getfixturevalue(name)
    theirs.config.id2label = {index: f"class {index}" for index in range(7)}
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        ours = gd.load_model(path, device="cpu")
        assert_equal_to(theirs, ours)
    assert ours.config.num_queries == 10
    assert ours.inference_settings.class_names == tuple(f"class {index}" for index in range(7))


def test_directories_of_other_models_say_nothing(tmp_path):
    for content in (
        {"model_type": "yolos"},
        {"model_type": "conditional_detr", "backbone_config": {"model_type": "swin"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
        assert read_header(tmp_path) == CheckpointHeader()
    for content in ({"d_model": "256"}, {"encoder_layers": 10**6}, {"id2label": {"x": "a"}}, {"id2label": [3]}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "conditional_detr", **content}))
        with pytest.raises(ValueError, match=r"config\.json: "):
            read_header(tmp_path)
