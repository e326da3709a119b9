"""``groupdetr check-groups``: its sources, its exit status, and its one sentence for what cannot be checked."""

import json
import sys

import pytest
from small_checkpoint import write_checkpoint

from groupdetr_fast import cli

MODULE = """
import torch
from torch import nn

class Detector(nn.Module):
    def __init__(self, leaks):
        super().__init__()
        self.embed, self.image, self.head = nn.Embedding(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)
        self.leaks = leaks

    def forward(self, images):
        queries = self.embed.weight if self.training else self.embed.weight[:3]
        if self.leaks:
            queries = queries + queries.mean(0)
        return self.head(queries + self.image(images.mean((2, 3)))[:, None])

def sound():
    return Detector(False)

def leaky():
    return Detector(True)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A file of functions in the working directory."""
    (tmp_path / "detectors_of_a_stranger.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "detectors_of_a_stranger"
    sys.modules.pop("detectors_of_a_stranger", None)


def test_a_sound_one_ends_well(module, capsys):
    cli.main(["check-groups", f"{module}:sound"])
    text = capsys.readouterr().out
    assert text.startswith("Detector: 2 groups of 3 queries; evaluation uses group 0\n")
    assert text.endswith("no group sees another\n")


def test_a_leak_gives_exit_status_1(module, capsys):
    with pytest.raises(SystemExit, match=r"error: Detector has 1 fault$") as ended:
        cli.main(["check-groups", f"{module}:leaky", "--batch-size", "3", "--image-size", "16", "16"])
    assert ended.value.code  # a text, which Python prints, and ends with 1
    assert "fault: groups see each other in output: group " in capsys.readouterr().out


def test_json_alone_is_printed(module, capsys):
    with pytest.raises(SystemExit):
        cli.main(["check-groups", f"{module}:leaky", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert not content["ok"]
    assert content["outputs"][0]["name"] == "output"
    assert content["outputs"][0]["group_gradient"] > 0


def test_a_checkpoint_of_this_package(tmp_path, capsys):
    """Which has one group, as its header says."""
    cli.main(["check-groups", str(write_checkpoint(tmp_path)), "--image-size", "32", "32"])
    assert capsys.readouterr().out.startswith("ConditionalDetr: one group of queries\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: there is no model 'nothing'"),
        (["nothing:here"], "error: there is no function nothing:here"),
        (["{tmp}/text.bin"], "error: .*text.bin"),
        (["{tmp}"], "error: "),
        (["conditional_detr_r50", "--batch-size", "1"], "error: batch_size must be at least 2"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(arguments, message, tmp_path):
    (tmp_path / "text.bin").write_text("no weights")
    with pytest.raises(SystemExit, match=message) as ended:
        cli.main(["check-groups", *(each.format(tmp=tmp_path) for each in arguments)])
    assert "\n" not in str(ended.value)
