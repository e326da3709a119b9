"""What files say of their models: whole headers, old ones, those of other code; and the detectors that follow."""

import json
from dataclasses import asdict

import pytest
from small_models import build

import groupdetr_fast as gd
from groupdetr_fast.models.checkpoints import CheckpointHeader, build_detector


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
