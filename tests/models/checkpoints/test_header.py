"""What files say of their models: whole headers, old ones, those of other code; and the detectors that follow."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from small_models import build

import groupdetr_fast as gd
from groupdetr_fast.models.checkpoints import CheckpointHeader, build_detector, read_header


def test_a_header_survives_json():
    header = CheckpointHeader(
        model="dn_detr_r50",
        model_config={"num_classes": 4, "num_groups": 2, "backbone": "conv:8"},
        categories=[{"id": 3, "name": "cat"}],
        labels="contiguous",
        evaluation={"eval_short_side": 32, "eval_max_size": None, "image_mean": [0.5, 0.4, 0.3]},
        epoch=7,
        AP=0.25,
    )
    assert CheckpointHeader.from_json(json.loads(json.dumps(header.to_json()))) == header


def test_missing_and_unknown_keys():
    header = CheckpointHeader.from_json({"model": "dab_detr_r50", "AP": None, "color": "red"})
    assert header == CheckpointHeader(model="dab_detr_r50")
    assert header.labels == "category_id"
    assert not {"epoch", "AP", "color"} & header.to_json().keys()
    assert CheckpointHeader.from_json({}) == CheckpointHeader()


def test_a_header_gives_its_detector():
    model = build(num_groups=3)
    settings = {**asdict(model.config), "backbone_weights": "imagenet"}
    header = CheckpointHeader(model="conditional_detr_r50", model_config=settings)
    assert build_detector(header).config == model.config  # without the weights of the backbone
    assert build_detector(header, num_groups=1).config.num_groups == 1
    defaults = build_detector(CheckpointHeader(model="dino_4scale_r50", model_config={"backbone": "conv:8-16-16"}))
    assert defaults.config == gd.models.model_config("dino_4scale_r50", backbone="conv:8-16-16")


def test_headers_without_a_known_detector_are_refused():
    with pytest.raises(ValueError, match="does not say which detector it is of"):
        build_detector(CheckpointHeader(model_config={"num_classes": 4}))
    with pytest.raises(ValueError, match="unknown model 'yolo'"):
        build_detector(CheckpointHeader(model="yolo"))
    with pytest.raises(ValueError, match="has no setting 'color'"):
        build_detector(CheckpointHeader(model="dab_detr_r50", model_config={"color": "red"}))


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "the header must be an object of json"),
        ({"model": ["dab_detr_r50"]}, "'model' in the header must be a name or null"),
        ({"labels": "names"}, "'labels' in the header must be"),
        ({"epoch": "7"}, "'epoch' in the header must be a whole number"),
        ({"AP": float("nan")}, "'AP' in the header must be a number"),
        ({"model_config": [4]}, "'model_config' in the header must be an object"),
        (
            {"model_config": {"encoder_layers": 10**6}},
            r"encoder_layers' in the header must be .* \(numbers at most 100\)",
        ),
        ({"model_config": {"num_queries": 10**9}}, r"num_queries' in the header must be .*, got 1000000000"),
        ({"model_config": {"num_queries": "300"}}, "num_queries' in the header must be a whole number .*, got '300'"),
        (
            {"model_config": {"num_queries": [300]}},
            r"num_queries' in the header must be a whole number .*, got \[300\]",
        ),
        ({"model_config": {"num_queries": True}}, "num_queries' in the header must be a whole number .*, got True"),
        ({"model_config": {"dropout": float("inf")}}, "dropout' in the header must be a number"),
        ({"model_config": {"denoising_scope": "all"}}, "denoising_scope' in the header must be one of first, every"),
        ({"model_config": {"color": json.loads(nested(200))}}, r"color' in the header must be .*, got \[\[\["),
        ({"model_config": {"backbone": "conv:8-9999999"}}, "backbone' in the header must be the name of a backbone"),
        ({"model_config": {"backbone": "-".join(["conv:8"] + ["8"] * 999)}}, "must be"),
        (
            {"model_config": {"backbone": "timm:../../weights"}},
            "backbone' in the header must be the name of a backbone",
        ),
        (
            {"model_config": {"num_queries": 99_999, "num_groups": 9_999}},
            "is of a model with 4019230705 parameters, and at most",
        ),
        ({"model_config": {"d_model": 80_000, "dim_feedforward": 80_000}}, "is of a model with .* parameters"),
        ({"evaluation": {"eval_short_side": 10**9}}, "eval_short_side' in the header must be a whole number from 1 to"),
        ({"evaluation": {"eval_max_size": "1333"}}, "eval_max_size' in the header must be a whole number from 1 to"),
        ({"evaluation": {"image_mean": [0.5]}}, "image_mean' in the header must be three numbers"),
        ({"evaluation": {"flip": 0.5}}, "the header has the unknown setting 'evaluation.flip'"),
        ({"categories": {"id": 1}}, "'categories' in the header must be a list"),
        ({"categories": [3]}, r"'categories\[0\]' in the header must be an object"),
        ({"categories": [{"id": 10**12, "name": "a"}]}, r"'categories\[0\].id' in the header must be .* to 99999"),
        ({"categories": [{"id": 1}]}, r"'categories\[0\].name' in the header must be a text, got None"),
    ],
)
def test_made_up_headers_are_refused_in_one_short_sentence(tmp_path, content, message):
    if isinstance(content, dict):
        content = {"model": "dn_detr_r50", **content}
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"groupdetr_fast": json.dumps(content)})
    for read in (read_header, gd.load_model):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"checkpoint {path}: ")
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", nested(100_000), "9" * 5000])
def test_headers_that_are_no_json_are_refused(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"groupdetr_fast": text})
    with pytest.raises(ValueError, match=r"a\.safetensors has a header that is no json"):
        read_header(tmp_path / "a.safetensors")


def test_every_detector_has_a_header_that_is_read():
    for name in gd.models.model_names():
        settings = asdict(gd.models.model_config(name))
        header = CheckpointHeader(model=name, model_config=settings)
        assert CheckpointHeader.from_json(json.loads(json.dumps(header.to_json()))) == header
