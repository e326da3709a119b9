"""Loading: any number of groups, other classes, and what does not fit. Layouts are tested beside this file."""

import functools
import json

import pytest
import torch
from safetensors.torch import save_file
from small_models import DETECTORS, randomize, same_weights
from small_models import build as build_small

import groupdetr_fast as gd
from groupdetr_fast.models import CheckpointMismatch

build = functools.partial(build_small, backbone="conv:8-8-8")


@pytest.mark.parametrize("name", [*DETECTORS, "mask2former_r50"])
def test_own_weights_load_as_they_are(name):
    backbone = "conv:8-8-8-8"
    source, target = (build(name, num_groups=2, backbone=backbone) for _ in range(2))
    randomize(source)
    report = gd.load_checkpoint(target, source.state_dict())
    assert (report.layout, report.groups) == ("groupdetr_fast", (2, 2))
    assert report.matched == list(source.state_dict())
    assert (report.missing, report.dropped, report.repeated) == ([], [], [])
    assert same_weights(source, target)


@pytest.mark.parametrize("name", DETECTORS)
def test_fewer_groups_and_queries_are_taken_from_each_group(name):
    source, target = randomize(build(name, num_groups=3)), build(name, num_groups=2, num_queries=4)
    report = gd.load_checkpoint(target, source.state_dict(), num_groups=3)
    assert report.groups == (3, 2)
    for key in target.group_parameters:
        expected = source.get_parameter(key).unflatten(0, (3, -1))[:2]
        got = target.get_parameter(key).unflatten(0, (2, -1))
        assert torch.equal(got, expected[:, : got.shape[1]])
    queries = target.get_parameter(target.group_parameters[0])
    assert len(queries) == 2 * 4


@pytest.mark.parametrize("name", DETECTORS)
def test_more_groups_keep_their_fresh_initialisation(name):
    source, target = randomize(build(name, num_groups=2)), build(name, num_groups=3)
    fresh = {key: target.get_parameter(key).detach().clone() for key in target.group_parameters}
    gd.load_checkpoint(target, source.state_dict(), num_groups=2)
    for key in target.group_parameters:
        groups = target.get_parameter(key).unflatten(0, (3, -1))
        assert torch.equal(groups[:2], source.get_parameter(key).unflatten(0, (2, -1)))
        assert torch.equal(groups[2], fresh[key].unflatten(0, (3, -1))[2])


def test_own_file_says_its_groups(tmp_path):
    source, target = build(num_groups=3), build(num_groups=1, num_queries=5)
    metadata = json.dumps({"model_config": {"num_groups": 3, "num_queries": 10}})
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path, metadata={"groupdetr_fast": metadata})
    report = gd.load_checkpoint(target, path)
    assert report.groups == (3, 1)
    assert torch.equal(target.query_embed.weight, source.query_embed.weight[:5])


def state_of(*arguments, **options):
    return lambda: build(*arguments, **options).state_dict()


@pytest.mark.parametrize(
    ("make_state", "options", "message"),
    [
        (
            state_of(num_groups=3),
            {},
            r"query_embed.weight has 30 rows in the checkpoint, neither one group of 10 queries nor the model's "
            r"2 \* 10: pass num_groups",
        ),
        (
            state_of(num_groups=3),
            {"num_groups": 4},
            "has 30 rows in the checkpoint, which are not 4 groups of at least 10 queries",
        ),
        (
            state_of(num_classes=9),
            {},
            r"class_embed.weight has shape \[9, 64\] in the checkpoint and \[7, 64\] in the model \(pass new",
        ),
        (state_of(d_model=32), {}, r"has shape \[.*\] in the checkpoint and \[.*\] in the model"),
        (
            state_of(decoder_layers=4),
            {},
            r"ConditionalDetr \(.*Conditional DETR\); the model has no place for decoder.layers.3",
        ),
        (state_of(encoder_layers=1), {}, r"it lacks encoder.layers.1.self_attn.in_proj_weight, .* and 7 more; pass"),
        (
            state_of("dab_detr_r50"),
            {},
            r"\Athe checkpoint does not fit ConditionalDetr \(it looks like one of DAB-DETR\); it lacks "
            r"query_embed.weight; the model has no place for encoder.layers.0.activation.weight, .* and 9 more; "
            r"pass partial=True to load what fits\Z",
        ),
        (state_of("dn_detr_r50"), {}, "it looks like one of DN-DETR"),
        (state_of("dab_deformable_detr_r50"), {}, "it looks like one of DAB-Deformable-DETR"),
        (state_of("dino_4scale_r50"), {}, "it looks like one of DINO"),
        (state_of("mask2former_r50", backbone="conv:8-8-8-8"), {}, "it looks like one of Mask2Former"),
        (lambda: {"some.weight": torch.zeros(2)}, {}, r"tensor names \(such as some.weight\) are those of none of"),
        (
            lambda: {"decoder.layers.0.norm1.weight": torch.zeros(2)},
            {"partial": True},
            "no tensor of the checkpoint has the shape that ConditionalDetr needs",
        ),
        (
            lambda: {"decoder.layers.0.other.weight": torch.zeros(2)},
            {"partial": True},
            "does not fit ConditionalDetr: no tensor of it belongs to the model",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(make_state, options, message):
    target = build(num_groups=2)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=message):
        gd.load_checkpoint(target, make_state(), **options)
    assert all(torch.equal(before[key], tensor) for key, tensor in target.state_dict().items())


def test_conditional_detr_is_not_taken_for_dab_detr():
    with pytest.raises(CheckpointMismatch, match=r"does not fit DabDetr \(it looks like one of Conditional DETR"):
        gd.load_checkpoint(build("dab_detr_r50"), build().state_dict())
    with pytest.raises(
        CheckpointMismatch, match=r"DabDetr .*DN-DETR\); the model has no place for label_enc.weight; pass"
    ):
        gd.load_checkpoint(build("dab_detr_r50"), build("dn_detr_r50").state_dict())


@pytest.mark.parametrize("name", DETECTORS)
def test_new_class_head_keeps_what_belongs_to_the_classes_fresh(name):
    source, target = randomize(build(name, num_classes=9)), build(name, num_groups=2)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    report = gd.load_checkpoint(target, source.state_dict(), new_class_head=True)
    expected = {key for key in before if "class_embed" in key or "label_enc" in key}
    assert set(report.missing) == set(report.dropped) == expected
    for key, tensor in target.state_dict().items():
        if key in expected:
            assert torch.equal(tensor, before[key])
        elif key not in target.group_parameters:
            assert torch.equal(tensor, source.state_dict()[key])


def test_partial_takes_what_fits():
    source, target = randomize(build("dab_detr_r50")), build("dn_detr_r50")
    report = gd.load_checkpoint(target, source.state_dict(), partial=True)
    assert (report.missing, report.dropped) == (["label_enc.weight"], [])
    assert torch.equal(target.refpoint_embed.weight, source.refpoint_embed.weight)

    target = build(dim_feedforward=80)
    fresh = target.encoder.layers[0].linear1.weight.detach().clone()
    report = gd.load_checkpoint(target, build().state_dict(), partial=True)
    assert "encoder.layers.0.linear1.weight" in report.missing
    assert "encoder.layers.0.linear1.weight" in report.dropped
    assert torch.equal(target.encoder.layers[0].linear1.weight, fresh)


def test_the_report_reads_as_a_sentence():
    report = gd.load_checkpoint(build("dn_detr_r50", num_groups=2), build("dab_detr_r50").state_dict(), partial=True)
    count = len(report.matched)
    assert str(report) == (
        f"{count} tensors loaded from a checkpoint of groupdetr_fast; groups: 1 in the checkpoint, 2 in the model; "
        "missing: label_enc.weight"
    )
