"""The command ``groupdetr``."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.coco_training import CocoTrainingConfig, digits_demo
from groupdetr_fast.data import DigitsConfig, digits_dataset
from groupdetr_fast.recipes import RECIPES


@pytest.fixture
def training(monkeypatch):
    """The configurations of trainings that the command would have started."""
    started = []
    monkeypatch.setattr(cli, "train", started.append)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "nope"], "error: unknown recipe 'nope'"),
        (
            ["train", "--output", "{tmp}/run"],
            "error: give data_path, coco_path, or both val_images and val_annotations",
        ),
        (["train", "--num-groups", "0", "--coco-path", "nowhere", "--output", "{tmp}"], "error: image folder nowhere"),
        (
            ["eval", "--load", "{tmp}/none.pth", "--coco-path", "c"],
            "does not say which detector it is of: pass --model",
        ),
    ],
)
def test_faults_are_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        cli.main([argument.format(tmp=tmp_path) for argument in arguments])


def test_recipes_are_listed_with_the_papers_numbers(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(RECIPES)
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["recipe"] == ["K", "N", "epochs", "drop", "batch", "AP", "baseline"]
    assert cells["group_conditional_detr_r50_12e"] == ["11", "300", "12", "11", "16", "37.6", "32.6"]
    assert cells["dino_4scale_r50_36e"] == ["1", "900", "36", "30", "16", "50.9", "-"]


def test_env_tells_versions_and_kernels(capsys):
    cli.main(["env"])
    text = capsys.readouterr().out
    assert f"groupdetr_fast  {gd.__version__}" in text
    for op, kernels in gd.ops.backends().items():
        assert re.search(rf"^{op} +cpu: {re.escape(kernels['cpu'])}, cuda: {kernels['cuda']}$", text, re.MULTILINE)


def test_the_module_runs_as_the_command():
    command = [sys.executable, "-m", "groupdetr_fast", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    commands = re.search(r"\{(.*)\}", done.stdout)[1].split(",")
    assert {"train", "eval", "predict", "check", "recipes", "env"} <= set(commands)


def test_a_trained_checkpoint_is_evaluated_without_saying_its_sizes(tmp_path, capsys):
    """And without the files it was trained on: the same numbers as at the end of the training."""
    size = DigitsConfig(image_size=48, train_images=6, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    digits = digits_dataset(tmp_path / "digits", config=size)
    sizes = ["--num-queries=5", "--d-model=32", "--num-heads=2", "--encoder-layers=1", "--decoder-layers=1"]
    sizes += ["--dim-feedforward=32", "--backbone=conv:8-16", "--num-groups=2", "--eval-short-side=48"]
    val = ["--val-images", digits.val_images, "--val-annotations", digits.val_annotations, "--workers=0"]
    data = ["--train-images", digits.train_images, "--train-annotations", digits.train_annotations, *val]
    short = ["--short-sides", "48", "--crop=0", "--epochs=1", "--lr=1e-2", "--output", tmp_path / "run"]
    cli.main([str(argument) for argument in ["train", *data, *sizes, *short]])
    trained = capsys.readouterr().out

    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_0001"
    evaluation = ["--load", checkpoint, "--output", tmp_path / "eval", "--pictures=0"]
    cli.main([str(argument) for argument in ["eval", *evaluation, *val]])
    table = re.compile(r"^.*Average.*$", re.MULTILINE)
    assert len(table.findall(trained)) >= 6
    assert table.findall(capsys.readouterr().out) == table.findall(trained)
    first, second = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("run", "eval"))
    assert first == second
    assert len(first) > 0


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
        cli.training_defaults(["--recipe", "dab_detr_r50_12e"]), recipe=None, config=training[0].config
    )


def test_faults_of_a_configuration_name_file_and_key(tmp_path):
    (tmp_path / "wrong.yaml").write_text("model: {num_groupz: 3}\n")
    with pytest.raises(
        SystemExit, match=r"error: .*wrong.yaml: unknown key model.num_groupz; perhaps model.num_groups"
    ):
        cli.main(["train", "--config", str(tmp_path / "wrong.yaml")])
    with pytest.raises(SystemExit, match="error: give --recipe or --config, not both"):
        cli.main(["train", "--config", "a.yaml", "--recipe", "dab_detr_r50_12e"])


def test_the_demo_stays_the_default_of_the_example():
    default = cli.training_defaults([], otherwise=digits_demo())
    assert default.model == digits_demo().model
    assert cli.training_defaults(["--recipe", "dab_detr_r50_12e"], otherwise=digits_demo()).model.num_groups == 1
