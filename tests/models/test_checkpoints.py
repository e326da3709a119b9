"""Checkpoints of transformers and of the original repository, and any number of groups."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import groupdetr_fast as gd
from groupdetr_fast.models import CheckpointMismatch

SIZES = {
    "num_queries": 10,
    "d_model": 64,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "dim_feedforward": 96,
    "backbone": "resnet18",
}


def build(num_groups=1, num_classes=7, **overrides):
    return gd.build_model(
        "conditional_detr_r50", num_classes=num_classes, num_groups=num_groups, **{**SIZES, **overrides}
    )


def randomize(model):
    """Weights and statistics far from their initial values, so that every one of them matters."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "backbone" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.1)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConditionalDetrConfig(
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
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=10,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_labels=7,
    )
    torch.manual_seed(0)
    model = transformers.ConditionalDetrForObjectDetection(config).eval()
    randomize(model)
    return model


def padded_batch():
    images = torch.randn(2, 3, 96, 128)
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    masks[1, 70:] = True
    masks[1, :, 90:] = True
    return images.masked_fill(masks[:, None], 0), masks


@torch.no_grad()
def assert_equal_to(theirs, ours):
    images, masks = padded_batch()
    expected = theirs(pixel_values=images, pixel_mask=(~masks).long())
    out = ours.eval()(images, masks)
    assert expected.pred_boxes.std() > 0.05  # the comparison would mean little if all boxes were alike
    torch.testing.assert_close(out.logits[-1], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.boxes[-1], expected.pred_boxes, rtol=0, atol=1e-4)


def test_transformers_state_dict_gives_the_same_outputs(theirs):
    ours = build()
    report = gd.load_checkpoint(ours, theirs.state_dict())
    assert (report.missing, report.dropped) == ([], [])
    assert report.layout == "transformers"
    assert_equal_to(theirs, ours)


def test_transformers_directory_gives_the_same_outputs(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = build(num_groups=3)
    report = gd.load_checkpoint(ours, tmp_path)
    assert (report.missing, report.groups) == ([], (1, 3))
    assert_equal_to(theirs, ours)


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


def test_names_of_transformers_4_load(theirs):
    state = {}
    for key, tensor in theirs.state_dict().items():
        for pattern, replacement in _TRANSFORMERS_4:
            key = re.sub(pattern, replacement, key)
        state[key] = tensor
    assert "model.decoder.layers.1.sa_qcontent_proj.weight" in state
    ours = build()
    report = gd.load_checkpoint(ours, state)
    assert (report.missing, report.dropped) == ([], [])
    assert_equal_to(theirs, ours)


def original_names(model):
    """The state dict as the original repository names it (REFERENCE: the keys of its published checkpoints)."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        key = re.sub(r"\Abackbone\.body\.", "backbone.0.body.", key)
        renamed[re.sub(r"\A(encoder|decoder)\.", r"transformer.\1.", key)] = tensor.clone()
    return renamed


def test_original_file_loads(tmp_path):
    source, target = build(num_groups=2), build(num_groups=2)
    randomize(source)
    state = original_names(source)
    expected_keys = {
        "backbone.0.body.layer1.0.bn1.running_var",
        "transformer.encoder.layers.1.self_attn.in_proj_weight",
        "transformer.decoder.layers.0.ca_qpos_proj.weight",
        "transformer.decoder.layers.2.cross_attn.out_proj.bias",
        "transformer.decoder.query_scale.layers.1.weight",
        "transformer.decoder.ref_point_head.layers.0.bias",
        "query_embed.weight",
        "class_embed.bias",
        "bbox_embed.layers.2.weight",
        "input_proj.weight",
    }
    assert expected_keys <= set(state)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "epoch": 11, "args": argparse.Namespace(num_queries=10, group_detr=2)}, path)
    report = gd.load_checkpoint(target, path)
    assert (report.missing, report.dropped, report.groups) == ([], [], (2, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_more_groups_keep_group_0_and_are_not_copies():
    source, target = build(num_groups=1), build(num_groups=3)
    fresh = target.query_embed.weight.detach().clone()
    gd.load_checkpoint(target, source.state_dict())
    groups = target.query_embed.weight.detach().view(3, 10, 64)
    assert torch.equal(groups[0], source.query_embed.weight)
    assert torch.equal(groups[1:], fresh.view(3, 10, 64)[1:])
    assert not torch.equal(groups[1], groups[0])


def test_fewer_groups_and_queries_are_taken_from_each_group():
    source, target = build(num_groups=3), build(num_groups=2, num_queries=4)
    gd.load_checkpoint(target, source.state_dict(), num_groups=3)
    expected = source.query_embed.weight.view(3, 10, 64)[:2, :4]
    assert torch.equal(target.query_embed.weight.view(2, 4, 64), expected)


def test_own_file_says_its_groups(tmp_path):
    source, target = build(num_groups=3), build(num_groups=1, num_queries=5)
    metadata = json.dumps({"model_config": {"num_groups": 3, "num_queries": 10}})
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path, metadata={"groupdetr_fast": metadata})
    report = gd.load_checkpoint(target, path)
    assert report.groups == (3, 1)
    assert torch.equal(target.query_embed.weight, source.query_embed.weight[:5])


@pytest.mark.parametrize(
    ("make_state", "options", "message"),
    [
        (
            lambda: build(num_groups=3).state_dict(),
            {},
            r"query_embed.weight has 30 rows in the checkpoint, neither one group of 10 queries nor the model's "
            r"2 \* 10: pass num_groups",
        ),
        (
            lambda: build(num_groups=3).state_dict(),
            {"num_groups": 4},
            "has 30 rows in the checkpoint, which are not 4 groups of at least 10 queries",
        ),
        (
            lambda: build(num_classes=9).state_dict(),
            {},
            r"class_embed.weight has shape \[9, 64\] in the checkpoint and \[7, 64\] in the model \(pass new",
        ),
        (lambda: build(d_model=32).state_dict(), {}, r"has rows of shape \[32\]|has shape"),
        (lambda: {"some.weight": torch.zeros(2)}, {}, r"tensor names \(such as some.weight\) are those of none of"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(make_state, options, message):
    target = build(num_groups=2)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=message):
        gd.load_checkpoint(target, make_state(), **options)
    assert all(torch.equal(before[key], tensor) for key, tensor in target.state_dict().items())


def test_new_class_head_keeps_the_fresh_one():
    source, target = build(num_classes=9), build()
    fresh = target.class_embed.weight.detach().clone()
    report = gd.load_checkpoint(target, source.state_dict(), new_class_head=True)
    assert report.missing == report.dropped == ["class_embed.weight", "class_embed.bias"]
    assert torch.equal(target.class_embed.weight, fresh)
    assert torch.equal(target.input_proj.weight, source.input_proj.weight)


def test_unreadable_files_are_refused_in_one_sentence(tmp_path):
    model = build()
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        gd.load_checkpoint(model, tmp_path / "none.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            gd.load_checkpoint(model, tmp_path / name)
    torch.save(Intruder(tmp_path / "ran"), tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"objects.pth cannot be read as a file of tensors"):
        gd.load_checkpoint(model, tmp_path / "objects.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has neither"):
        gd.load_checkpoint(model, tmp_path / "empty")


class Intruder:
    """A pickle that would create a file when it is read carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))
