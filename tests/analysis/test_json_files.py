import json
from dataclasses import replace
from pathlib import Path

import pytest

from groupdetr_fast.analysis.run import Run
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_plain, to_json
from groupdetr_fast.runs.recipes import digits_demo
from groupdetr_fast.training.config import OptimizationConfig


@pytest.mark.parametrize(
    "config",
    [
        CocoTrainingConfig(data=DataConfig(coco_path=Path("coco")), assignment="one_to_many", positives=3),
        replace(digits_demo(compose=False), output=Path("elsewhere")),
        Run(CocoTrainingConfig(), 0.5),
    ],
    ids=["paper", "demo", "run"],
)
def test_json_and_back(config):
    assert from_plain(type(config), json.loads(json.dumps(to_json(config))), complete=True) == config


def test_equal_settings_have_equal_texts():
    texts = [
        json.dumps(
            to_json(replace(CocoTrainingConfig(), optimization=OptimizationConfig(lr_drop=drop, clip_norm=norm)))
        )
        for drop, norm in [((40,), 1), ((40.0,), 1.0)]
    ]
    assert texts[0] == texts[1]


def test_a_missing_setting_is_named():
    values = to_json(CocoTrainingConfig())
    del values["model"]["num_groups"]
    with pytest.raises(ValueError, match=r"key model\.num_groups is missing"):
        from_plain(CocoTrainingConfig, values, complete=True)
