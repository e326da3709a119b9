"""The command ``groupdetr`` as a whole."""

import itertools
import re
import subprocess
import sys

import pytest

from groupdetr_fast import cli
from groupdetr_fast.commands.env import running_version


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "nope"], "error: unknown recipe 'nope'"),
        (
            ["train", "--output", "{tmp}/run"],
            "error: give data_path, coco_path, or both val_images and val_annotations",
        ),
        (["train", "--coco-path", "nowhere", "--output", "{tmp}"], "error: image folder nowhere"),
        (["train", "--num-groups", "0", "--coco-path", "c"], "error: num_groups must be at least 1, got 0"),
        (
            ["eval", "{tmp}/none.pth", "--coco-path", "c"],
            "error: checkpoint: there is nothing at .*none.pth",
        ),
        (["train", "--config", "{tmp}/none.yaml"], "error: there is no configuration file .*none.yaml"),
        (["eval"], "error: name the checkpoint: groupdetr eval CHECKPOINT --data-path DIR"),
        (["predict"], "error: name the checkpoint: groupdetr predict CHECKPOINT IMAGES"),
        (["export", "--output", "a.onnx"], "error: name the checkpoint: groupdetr export CHECKPOINT --output FILE"),
    ],
)
def test_faults_are_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        cli.main([argument.format(tmp=tmp_path) for argument in arguments])


def test_a_file_where_there_should_be_a_folder_is_named(tmp_path):
    file = tmp_path / "notes.txt"
    file.touch()
    for output in (file, file / "run"):
        with pytest.raises(
            SystemExit, match=f"error: there can be no folder {output}: that, or what it is to be in, is a"
        ):
            cli.main(["train", "--coco-path", "c", "--output", str(output)])


def test_the_module_runs_as_the_command():
    command = [sys.executable, "-m", "groupdetr_fast", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    commands = re.search(r"\{(.*)\}", done.stdout)[1].split(",")
    assert {"train", "eval", "predict", "check", "recipes", "env"} <= set(commands)


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"groupdetr_fast {running_version()}\n"


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["train", "--batchsize", "3"], "--batch-size"),
        (["analyze", "group-ap", "--sed", "3"], "--seed"),
        (["predict", "a.pth", "b.jpg", "--top", "3"], "--top-k"),
        (["predict", "--top", "3", "a.pth", "b.jpg"], "--top-k"),
        (["eval", "--batchsize", "3", "a.pth"], "--batch-size"),
        (["export", "--mask", "a.pth", "--output", "a.onnx"], "--masks"),
        (["export", "a.pth", "--outpt", "a.onnx"], "--output"),
    ],
)
def test_misspelt_flags_suggest_those_of_the_command_at_hand(arguments, suggested, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    text = capsys.readouterr().err
    assert suggested in text
    own = "groupdetr " + " ".join(
        itertools.takewhile(lambda word: word.isidentifier() or word == "group-ap", arguments)
    )
    assert set(re.findall(r"groupdetr [a-z -]+ --help", text)) == {f"{own} --help"}


@pytest.mark.parametrize(
    "arguments",
    [[], ["bogus"], ["analyze"], ["analyze", "bogus"], ["train", "--recipe"], ["eval"], ["predict"], ["export"]],
)
def test_nobody_sees_the_parsers_own_names(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "tyro" not in capsys.readouterr().err


def test_an_interruption_ends_in_a_word(capsys):
    def parse():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run(parse)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
