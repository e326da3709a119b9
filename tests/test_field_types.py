"""Settings that somebody makes in Python have the types of their fields, or are refused as on the command line."""

from pathlib import Path

import numpy as np
import pytest

from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.training.config import LoopSettings, OptimizationConfig, TrainerSettings
from groupdetr_fast.training.rate_finder import SweepSettings


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (OptimizationConfig, "lr", 1, 1.0),
        (OptimizationConfig, "lr", np.float32(0.5), 0.5),
        (OptimizationConfig, "epochs", np.int64(3), 3),
        (OptimizationConfig, "lr_drop", [2, 3], (2.0, 3.0)),
        (OptimizationConfig, "freeze", ["backbone"], ("backbone",)),
        (DataConfig, "data_path", "data", Path("data")),
        (ModelConfig, "backbone_weights", Path("a.pth"), "a.pth"),
        (AugmentationConfig, "image_mean", [0, 0, 0], (0.0, 0.0, 0.0)),
        (CocoTrainingConfig, "output", "runs/a", Path("runs/a")),
        (CocoTrainingConfig, "checkpoint_minutes", 5, 5.0),
    ],
)
def test_values_get_the_types_of_their_fields(kind, name, value, expected):
    found = getattr(kind(**{name: value}), name)
    assert (found, type(found)) == (expected, type(expected))
    if isinstance(expected, tuple):
        assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (OptimizationConfig, "lr", "1e-4", "lr must be a number, got '1e-4'"),
        (OptimizationConfig, "lr", -1, "lr must not be negative and must be finite, got -1.0"),
        (OptimizationConfig, "epochs", 1.0, "epochs must be an integer, got 1.0"),
        (OptimizationConfig, "epochs", None, "epochs must be an integer, got None"),
        (OptimizationConfig, "epochs", 0, "epochs must be at least 1, got 0"),
        (OptimizationConfig, "batch_size", True, "batch_size must be an integer or auto, got True"),
        (OptimizationConfig, "decay", "linear", "decay must be one of step, cosine, got 'linear'"),
        (OptimizationConfig, "precision", "fp8", "precision must be one of no, bf16, fp16 or None, got 'fp8'"),
        (OptimizationConfig, "lr_drop", 11, "lr_drop must be a list, each entry a number or None, got 11"),
        (OptimizationConfig, "seed", -1, "seed must not be negative and must be finite, got -1"),
        (LoopSettings, "evaluate_every", 0, "evaluate_every must be at least 1, got 0"),
        (CocoTrainingConfig, "evaluate_every", 0, "evaluate_every must be at least 1, got 0"),
        (CocoTrainingConfig, "max_skipped_steps", -1, "max_skipped_steps must not be negative, got -1"),
        (CocoTrainingConfig, "assignment", 1, "assignment must be one of group, one_to_one, one_to_many, got 1"),
        (CocoTrainingConfig, "optimization", 3, "optimization must have keys and values, got 3"),
        (SweepSettings, "rate_steps", 20.5, "rate_steps must be an integer, got 20.5"),
        (DataConfig, "labels", "ids", "labels must be one of contiguous, category_id, got 'ids'"),
        (AugmentationConfig, "short_sides", 480, "short_sides must be a list, each entry an integer, got 480"),
        (ModelConfig, "num_groups", 3.0, "num_groups must be an integer, got 3.0"),
    ],
)
def test_what_the_command_line_refuses_is_refused(kind, name, value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        kind(**{name: value})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"checkpoint_minutes": float("nan")}, "checkpoint_minutes must not be negative, got nan"),
        ({"metadata": 3}, "metadata must be keys and values, got 3"),
        ({"optimization": None}, "optimization must have keys and values, got None"),
    ],
)
def test_settings_of_a_trainer(tmp_path, settings, message):
    right = TrainerSettings(OptimizationConfig(), str(tmp_path), {"a": 1}, checkpoint_minutes=1)
    assert (right.run, right.metadata, right.checkpoint_minutes) == (tmp_path, {"a": 1}, 1.0)
    with pytest.raises(ValueError, match=message):
        TrainerSettings(**{"optimization": OptimizationConfig(), "run": tmp_path, **settings})
