"""The command ``groupdetr`` as a whole."""

import re
import subprocess
import sys

import pytest

from groupdetr_fast import cli


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


def test_the_module_runs_as_the_command():
    command = [sys.executable, "-m", "groupdetr_fast", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    commands = re.search(r"\{(.*)\}", done.stdout)[1].split(",")
    assert {"train", "eval", "predict", "check", "recipes", "env"} <= set(commands)
