"""The command ``groupdetr train``."""

from dataclasses import replace
from pathlib import Path

import pytest

from groupdetr_fast import cli
from groupdetr_fast.commands import train
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.demo import digits_demo
from groupdetr_fast.runs.recipes import RECIPES


@pytest.fixture
def training(monkeypatch):
    """The configurations of trainings that the command would have started."""
    started = []
    monkeypatch.setattr(train, "train", started.append)
    return started


@pytest.fixture
def evaluations(monkeypatch):
    """The same of evaluations."""
    started = []
    monkeypatch.setattr(train, "evaluate_checkpoint", started.append)
    return started


def test_flags_reach_the_training(training):
    cli.main(["train", "--coco-path", "coco", "--model", "dab_detr_r50", "--num-groups=3", "--lr", "2e-4"])
    (config,) = training
    assert isinstance(config, CocoTrainingConfig)
    assert (config.data.coco_path, config.model.model, config.model.num_groups) == (Path("coco"), "dab_detr_r50", 3)
    assert config.optimization.lr == 2e-4


@pytest.mark.parametrize("flag", [["--recipe", "group_dab_detr_r50_50e"], ["--recipe=group_dab_detr_r50_50e"]])
def test_a_recipe_gives_defaults_and_flags_override_them(training, flag, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    cli.main(["train", "--coco-path", "coco", *flag, "--num-groups", "5"])
    (config,) = training
    assert config.recipe == "group_dab_detr_r50_50e"
    expected = RECIPES["group_dab_detr_r50_50e"].config(processes=4)
    assert config.optimization == expected.optimization
    assert config.model == replace(expected.model, num_groups=5)
    assert config.data == replace(expected.data, coco_path=Path("coco"))
    assert (config.top_k, config.output) == (expected.top_k, expected.output)


def test_a_training_that_only_evaluates_is_an_evaluation(training, evaluations):
    cli.main(["train", "--coco-path", "coco", "--eval-only", "--load", "checkpoint.pth"])
    (config,) = evaluations
    assert (config.data.coco_path, config.model.load) == (Path("coco"), Path("checkpoint.pth"))
    assert training == []


def test_an_evaluation_goes_beside_the_run_unless_its_folder_is_named(evaluations, tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(CocoTrainingConfig(output=tmp_path / "run").as_yaml())
    evaluate = ["train", "--coco-path", "coco", "--load", "best", "--eval-only"]
    cli.main([*evaluate])
    cli.main([*evaluate, "--config", str(saved)])
    cli.main([*evaluate, "--config", str(saved), "--output", "elsewhere"])
    assert [config.output for config in evaluations] == [
        Path("runs/coco/eval"),
        tmp_path / "run" / "eval",
        Path("elsewhere"),
    ]


def test_a_configuration_gives_defaults_and_flags_override_them(training, tmp_path):
    saved = RECIPES["group_mask2former_r50_12e"].config(processes=8)
    (tmp_path / "config.yaml").write_text(saved.as_yaml())
    cli.main(["train", "--config", str(tmp_path / "config.yaml"), "--lr", "2e-4", "--coco-path", "coco"])
    (config,) = training
    assert config.optimization == replace(saved.optimization, lr=2e-4)
    assert config.data == replace(saved.data, coco_path=Path("coco"))
    assert (config.model, config.augmentation, config.output) == (saved.model, saved.augmentation, saved.output)


def test_a_recipe_is_written_as_a_configuration(training, tmp_path, capsys):
    cli.main(["recipes", "dab_detr_r50_12e"])
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    cli.main(["train", f"--config={tmp_path / 'recipe.yaml'}"])
    assert training[0] == replace(
        train.training_defaults(["--recipe", "dab_detr_r50_12e"]), recipe=None, config=training[0].config
    )


def test_faults_of_a_configuration_name_file_and_key(tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: {num_groupz: 3}\n")
    with pytest.raises(
        SystemExit, match=r"error: .*wrong.yaml: unknown key model.num_groupz; perhaps model.num_groups"
    ):
        cli.main(["train", "--config", str(tmp_path / "wrong.yaml")])
    with pytest.raises(SystemExit, match="error: give --recipe or --config, not both"):
        cli.main(["train", "--config", "a.yaml", "--recipe", "dab_detr_r50_12e"])


@pytest.mark.parametrize("name", ["dab_detr_r5", "None", ""])
def test_a_detector_that_there_is_not_is_refused_before_the_training(training, name):
    with pytest.raises(SystemExit, match=f"error: unknown model '{name}'; the models are conditional_detr_r50, "):
        cli.main(["train", "--coco-path", "coco", "--model", name])
    assert training == []


def test_what_a_model_is_called_is_a_text(training, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--coco-path", "coco", "--model"])
    assert "--model takes a text, and got nothing" in capsys.readouterr().err
    assert training == []


def test_a_configuration_of_no_detector_leaves_no_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {model: nonsense}\n")
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"error: .*unknown model 'nonsense'"):
        cli.main(["train", "--config", str(tmp_path / "config.yaml"), "--coco-path", "coco", "--output", str(run)])
    assert not run.exists()
    with pytest.raises(ValueError, match="unknown model 'nonsense'"):
        CocoTrainingConfig().with_settings(model="nonsense")


@pytest.mark.parametrize("command", ["train", "find-rate"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    "others",
    [
        ["--model", "NAME"],
        ["--model", "transformers:/nowhere"],
        ["--config", "/nowhere/config.yaml"],
        ["--recipe", "NAME"],
        ["--config", "a.yaml", "--recipe", "dab_detr_r50_12e"],
    ],
)
def test_help_is_shown_whatever_else_is_asked_for(command, flag, others, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, *others, flag])
    assert end.value.code == 0
    assert "--num-queries" in capsys.readouterr().out


def test_the_demo_stays_the_default_of_the_example():
    default = train.training_defaults([], otherwise=digits_demo())
    assert default.model == digits_demo().model
    assert train.training_defaults(["--recipe", "dab_detr_r50_12e"], otherwise=digits_demo()).model.num_groups == 1
