"""docs/tutorial.md, every block in its order, on a model and images that take seconds."""

import re
import shlex
from pathlib import Path

import pytest

from groupdetr_fast import cli

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
# Later flags go before those of the page.
SMALL = """--num-groups 2 --num-queries 6 --d-model 32 --num-heads 4 --encoder-layers 1 --decoder-layers 2
    --dim-feedforward 32 --backbone conv:8-16-16 --backbone-weights None --epochs 2 --batch-size 8 --workers 0
    --short-sides 48 --crop 0 --eval-short-side 48"""


def blocks():
    """The commands and programs of the page, as (language, text)."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if not text.startswith("pip install")]


@pytest.mark.slow
def test_every_block_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    commands, names = [], {}
    for language, text in blocks():
        if language == "python":
            text = text.replace("train_images=200, val_images=40", "train_images=16, val_images=4, image_size=64")
            exec(compile(text.replace("0.3", "0.0"), str(TUTORIAL), "exec"), names)  # weights that know nothing yet
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "groupdetr"
            commands.append(arguments[0])
            if "--data-path" in arguments and arguments[0] == "train":
                arguments += SMALL.split()
            cli.main(arguments)
    assert commands == ["check", "train", "train", "eval", "predict", "export"]
    assert (tmp_path / "runs/mine/predictions/predictions.json").is_file()
    assert (tmp_path / "runs/mine/model.onnx").is_file()
    by_model, by_onnx = names["found"], names["scores"]
    assert len(by_model["boxes"]) > 0
    assert by_onnx.shape == (6, 10)
    capsys.readouterr()
