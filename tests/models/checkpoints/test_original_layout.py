"""Files of the original repositories: every key and every tensor, from and to each of them."""

import argparse
import itertools
import re

import pytest
import torch
from small_models import DETECTORS, build, padded_batch, randomize, same_weights

import groupdetr_fast as gd
from groupdetr_fast.models import CheckpointMismatch
from groupdetr_fast.models.checkpoints.original import original_keys


def expand(pattern):
    """``a.{0..2}.{b,c}`` -> a.0.b, a.0.c, a.1.b, ..."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = []
    for inside in parts[1::2]:
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        choices.append([str(i) for i in range(int(numbers[1]), int(numbers[2]) + 1)] if numbers else inside.split(","))
    for chosen in itertools.product(*choices):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], chosen, fillvalue="")))


# The keys that the original models have, instantiated with their default settings for ResNet-50.
BATCH_NORM = "{weight,bias,running_mean,running_var}"
BACKBONE = [
    "backbone.0.body.conv1.weight",
    f"backbone.0.body.bn1.{BATCH_NORM}",
    "backbone.0.body.layer{1..4}.{0..2}.conv{1..3}.weight",
    f"backbone.0.body.layer{{1..4}}.{{0..2}}.bn{{1..3}}.{BATCH_NORM}",
    "backbone.0.body.layer{2,3}.3.conv{1..3}.weight",
    f"backbone.0.body.layer{{2,3}}.3.bn{{1..3}}.{BATCH_NORM}",
    "backbone.0.body.layer3.{4,5}.conv{1..3}.weight",
    f"backbone.0.body.layer3.{{4,5}}.bn{{1..3}}.{BATCH_NORM}",
    "backbone.0.body.layer{1..4}.0.downsample.0.weight",
    f"backbone.0.body.layer{{1..4}}.0.downsample.1.{BATCH_NORM}",
]
ENCODER = [
    "transformer.encoder.layers.{0..5}.{linear1,linear2,norm1,norm2}.{weight,bias}",
    "transformer.encoder.layers.{0..5}.self_attn.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}",
]
CONDITIONAL_DECODER = [
    "transformer.decoder.layers.{0..5}.sa_{qcontent,qpos,kcontent,kpos,v}_proj.{weight,bias}",
    "transformer.decoder.layers.{0..5}.ca_{qcontent,kcontent,kpos,v,qpos_sine}_proj.{weight,bias}",
    "transformer.decoder.layers.0.ca_qpos_proj.{weight,bias}",
    "transformer.decoder.layers.{0..5}.{self,cross}_attn.out_proj.{weight,bias}",
    "transformer.decoder.layers.{0..5}.{linear1,linear2,norm1,norm2,norm3}.{weight,bias}",
    "transformer.decoder.norm.{weight,bias}",
    "transformer.decoder.{query_scale,ref_point_head}.layers.{0,1}.{weight,bias}",
]
SINGLE_LEVEL = [*BACKBONE, *ENCODER, *CONDITIONAL_DECODER, "input_proj.{weight,bias}", "class_embed.{weight,bias}"]
DAB = [
    *SINGLE_LEVEL,
    "refpoint_embed.weight",
    "transformer.encoder.query_scale.layers.{0,1}.{weight,bias}",
    "transformer.decoder.ref_anchor_head.layers.{0,1}.{weight,bias}",
    "transformer.{en,de}coder.layers.{0..5}.activation.weight",
    "{,transformer.decoder.}bbox_embed.layers.{0..2}.{weight,bias}",
]
DEFORMABLE_ATTENTION = "{sampling_offsets,attention_weights,value_proj,output_proj}.{weight,bias}"
DEFORMABLE = [
    *BACKBONE,
    "input_proj.{0..3}.{0,1}.{weight,bias}",
    "transformer.level_embed",
    f"transformer.encoder.layers.{{0..5}}.self_attn.{DEFORMABLE_ATTENTION}",
    "transformer.encoder.layers.{0..5}.{linear1,linear2,norm1,norm2}.{weight,bias}",
    f"transformer.decoder.layers.{{0..5}}.cross_attn.{DEFORMABLE_ATTENTION}",
    "transformer.decoder.layers.{0..5}.self_attn.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}",
    "transformer.decoder.layers.{0..5}.{linear1,linear2,norm1,norm2,norm3}.{weight,bias}",
    "transformer.decoder.ref_point_head.layers.{0,1}.{weight,bias}",
    "{,transformer.decoder.}bbox_embed.{0..5}.layers.{0..2}.{weight,bias}",
    "class_embed.{0..5}.{weight,bias}",
]
KEYS = {
    "conditional_detr_r50": [*SINGLE_LEVEL, "query_embed.weight", "bbox_embed.layers.{0..2}.{weight,bias}"],
    "dab_detr_r50": DAB,
    "dn_detr_r50": [*DAB, "label_enc.weight"],
    "dab_deformable_detr_r50": [
        *DEFORMABLE,
        "{tgt_embed,refpoint_embed}.weight",
        "transformer.decoder.query_scale.layers.{0,1}.{weight,bias}",
    ],
    "dino_4scale_r50": [
        *DEFORMABLE,
        "label_enc.weight",
        "transformer.tgt_embed.weight",
        "transformer.decoder.norm.{weight,bias}",
        "transformer.decoder.class_embed.{0..5}.{weight,bias}",
        "transformer.{enc_output,enc_output_norm,enc_out_class_embed}.{weight,bias}",
        "transformer.enc_out_bbox_embed.layers.{0..2}.{weight,bias}",
    ],
}
COUNTS = {
    "conditional_detr_r50": 564,
    "dab_detr_r50": 590,
    "dn_detr_r50": 591,
    "dab_deformable_detr_r50": 604,
    "dino_4scale_r50": 626,
}


@pytest.mark.parametrize("name", DETECTORS)
def test_the_keys_are_those_of_the_original_model(name):
    with torch.device("meta"):
        model = gd.build_model(name, num_classes=91, num_groups=1)
    expected = {key for pattern in KEYS[name] for key in expand(pattern)}
    assert len(expected) == COUNTS[name]
    keys_of = original_keys(model)
    keys = [key for tensor in model.state_dict() for key in keys_of(tensor)]
    assert sorted(keys) == sorted(expected)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_round_trip_keeps_every_bit(name, tmp_path):
    source, target = randomize(build(name)), build(name)
    state = gd.export_checkpoint(source, tmp_path / "checkpoint.pth")
    report = gd.load_checkpoint(target, tmp_path / "checkpoint.pth")
    assert same_weights(source, target)
    assert report.layout == "the original repository"
    assert (report.missing, report.dropped, report.groups) == ([], [], (1, 1))
    assert len(report.matched) + len(report.repeated) == len(state)
    assert sorted(report.matched) == sorted(source.state_dict())
    assert not any(key.endswith("num_batches_tracked") for key in state)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_any_group_can_be_exported(name, tmp_path):
    source, target = randomize(build(name, num_groups=3)).eval(), build(name).eval()
    gd.export_checkpoint(source, tmp_path / "checkpoint.pth", group=2)
    gd.load_checkpoint(target, tmp_path / "checkpoint.pth")
    images, masks = padded_batch()
    expected, out = source(images, masks, inference_group=2), target(images, masks)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.boxes, expected.boxes)
    one = sum(tensor.numel() for tensor in target.state_dict().values()) * 4
    assert (tmp_path / "checkpoint.pth").stat().st_size < 1.1 * one  # heads that repeat take no room


@pytest.mark.parametrize("name", DETECTORS)
def test_one_group_becomes_group_0_and_the_others_stay_fresh(name):
    source, target = randomize(build(name)), build(name, num_groups=3)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    report = gd.load_checkpoint(target, gd.export_checkpoint(source, None))
    assert (report.missing, report.groups) == ([], (1, 3))
    after, weights = target.state_dict(), source.state_dict()
    for key, tensor in after.items():
        if key in target.group_parameters:
            assert torch.equal(tensor.unflatten(0, (3, -1))[0], weights[key])
            assert torch.equal(tensor.unflatten(0, (3, -1))[1:], before[key].unflatten(0, (3, -1))[1:])
        else:
            assert torch.equal(tensor, weights[key])
    first, second, _ = target.get_parameter(target.group_parameters[0]).unflatten(0, (3, -1))
    assert not torch.equal(first, second)


def test_a_file_of_the_original_group_detr_says_its_groups(tmp_path):
    """Its args hold group_detr, and its queries have K * N rows."""
    source, target = randomize(build(num_groups=2)), build(num_groups=1)
    state = gd.export_checkpoint(source, None)
    state["query_embed.weight"] = source.query_embed.weight.detach()
    arguments = argparse.Namespace(num_queries=10, group_detr=2)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 11, "args": arguments}, tmp_path / "c.pth")
    report = gd.load_checkpoint(target, tmp_path / "c.pth")
    assert report.groups == (2, 1)
    assert torch.equal(target.query_embed.weight, source.query_embed.weight[:10])


def test_the_report_names_the_keys_of_the_file():
    state = gd.export_checkpoint(build("dino_4scale_r50", num_classes=9), None)
    report = gd.load_checkpoint(build("dino_4scale_r50"), state, new_class_head=True)
    assert "class_embed.weight" in report.missing
    assert "class_embed.0.weight" in report.dropped
    assert {"transformer.decoder.bbox_embed.1.layers.0.bias", "class_embed.1.weight"} <= set(report.repeated)
    assert set(report.dropped) <= set(state)


def test_heads_that_should_be_one_must_be_equal():
    target = build("dino_4scale_r50")
    state = gd.export_checkpoint(randomize(build("dino_4scale_r50")), None)
    state["bbox_embed.2.layers.1.bias"] = state["bbox_embed.2.layers.1.bias"] + 1
    message = r"bbox_embed.0.layers.1.bias and bbox_embed.2.layers.1.bias differ in the checkpoint, but are one tensor"
    with pytest.raises(CheckpointMismatch, match=message):
        gd.load_checkpoint(target, state)


def test_only_one_of_two_equal_heads_is_enough():
    source, target = randomize(build("dab_detr_r50")), build("dab_detr_r50")
    state = gd.export_checkpoint(source, None)
    gd.load_checkpoint(target, {key: state[key] for key in state if not key.startswith("transformer.decoder.bbox")})
    assert same_weights(source, target)


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (lambda: build(num_groups=2), {"group": 2}, ValueError, r"group must be in \[0, 2\), got 2"),
        (build, {"layout": "detectron"}, ValueError, 'layout must be "original"'),
        (lambda: build(backbone="conv:8-16"), {}, ValueError, "whole ResNets as backbones, not 'conv:8-16'"),
        (lambda: build(input_norm=True), {}, ValueError, "this model has input_norm=True"),
        (lambda: torch.nn.Linear(1, 1), {}, TypeError, "expected a detector of this package, got Linear"),
    ],
)
def test_what_the_original_code_cannot_build_is_refused(make_model, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        gd.export_checkpoint(make_model(), tmp_path / "checkpoint.pth", **options)
    assert not (tmp_path / "checkpoint.pth").exists()
