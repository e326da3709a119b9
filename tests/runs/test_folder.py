"""The folder of a run: which trainings may use it, and what they find and leave there."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.folder import clear, holds_run, reserved
from groupdetr_fast.runs.kept_files import keep_files, was_begun
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.results import results_of

# Holds a folder until it is killed, and has a child that outlives it for a while, as a process that loads images may.
HOLDER = """
import os, sys, time
from pathlib import Path
from accelerate import Accelerator
from groupdetr_fast.runs.folder import reserved
with reserved(Accelerator(cpu=True), Path(sys.argv[1]), resume=False, overwrite=False):
    if os.fork() == 0:
        os.close(1)
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def reserve(folder, resume=False, overwrite=False):
    with reserved(Accelerator(cpu=True), folder, resume=resume, overwrite=overwrite):
        pass


@pytest.fixture
def folder(tmp_path):
    """A folder with the traces of a run, and a file of somebody else."""
    for name in ("checkpoints/epoch_0001/state.pt", "tensorboard/events", "results.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(results_of([], OptimizationConfig(), {})))
    return tmp_path


@pytest.mark.parametrize("left", ["checkpoints", "results.json"])
def test_a_run_is_not_lost_unasked(folder, left):
    removed = folder / ({"checkpoints", "results.json"} - {left}).pop()
    removed.rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=f"{folder} holds a run: give resume to go on with it, overwrite to replace"):
        reserve(folder)
    reserve(folder, resume=True)
    reserve(folder, overwrite=True)
    assert (folder / left).exists()  # nothing is removed before the new run begins


def test_clearing_leaves_what_is_not_of_the_run(folder):
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    reserve(folder)


def test_clearing_leaves_what_somebody_put_beside_checkpoints_and_pictures(folder):
    of_the_run = [
        "checkpoints/.epoch_0002.unfinished/state.pt",
        "checkpoints/best/model.safetensors",
        "report/worst.png",
    ]
    mine = ["checkpoints/mine.pt", "checkpoints/epoch_9.pth", "checkpoints/kept/a.pt", "report/thesis.tex"]
    for name in (*of_the_run, *mine):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    clear(folder)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == sorted([*mine, "notes.txt"])
    assert not (folder / "checkpoints" / "best").exists()


def test_clearing_follows_a_link_to_checkpoints_and_keeps_it(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk") / "checkpoints"
    (folder / "checkpoints").rename(disk)
    (folder / "checkpoints").symlink_to(disk)
    clear(folder)
    assert (folder / "checkpoints").is_symlink()
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("content", ['{"AP": 0.4, "epochs": 100, "best_epoch": 7}', "[]", "no json"])
def test_results_of_something_else_are_no_run_and_are_not_replaced(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "predictions.png").write_text("")
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.png", "results.json"]
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"results.json was not written by a run, and a training would replace it"):
            reserve(tmp_path, **how)
    assert not holds_run(tmp_path)  # an evaluation writes no such file


def test_nothing_is_removed_where_no_run_was(folder):
    (folder / "results.json").unlink()
    (folder / "checkpoints" / "epoch_0001" / "state.pt").rename(folder / "checkpoints" / "mine.pt")
    (folder / "checkpoints" / "epoch_0001").rename(folder / "checkpoints" / "another")
    (folder / "checkpoints" / "epoch_0001.pth").write_text("")
    clear(folder)
    assert (folder / "checkpoints" / "epoch_0001.pth").exists()
    assert (folder / "checkpoints" / "mine.pt").exists()
    assert (folder / "tensorboard" / "events").exists()
    (folder / "config.yaml").write_text(CocoTrainingConfig().as_yaml())  # of a run that ended before its first epoch
    clear(folder)
    assert not (folder / "tensorboard").exists()


def test_a_configuration_that_was_written_by_hand_is_not_lost(tmp_path, caplog):
    config = CocoTrainingConfig(output=tmp_path)
    mine = "# as in the paper\noptimization: {lr: 1e-4}\n"
    for number in ("", "2"):
        (tmp_path / "config.yaml").write_text(mine)
        keep_files(config, None, None)
        assert (tmp_path / f"config_before{number}.yaml").read_text().startswith(mine)
        assert f"it is called {tmp_path / f'config_before{number}.yaml'} from now on" in caplog.text
        keep_files(replace(config, top_k=7), None, None)  # what a run has written is replaced
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == [
        "config.yaml",
        "config_before.yaml",
        "config_before2.yaml",
    ]
    assert "top_k: 7\n" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0, "flip": 0, "crop": 0, "clip_norm": 0, "dropout": 0, "checkpoint_minutes": 30},
        {"lr_drop": (40,), "image_mean": [0, 0, 0], "short_sides": [480]},
        {"output": Path("café: #1")},
    ],
    ids=["integers for floats", "lists for tuples", "a path that is quoted"],
)
def test_a_configuration_that_a_run_wrote_is_replaced_however_its_values_were_given(tmp_path, settings):
    (tmp_path / "config.yaml").write_text(CocoTrainingConfig().with_settings(**settings).as_yaml())
    assert was_begun(tmp_path)
    keep_files(CocoTrainingConfig(output=tmp_path), None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_configuration_of_an_older_version_was_written_by_a_run(tmp_path):
    lines = CocoTrainingConfig().as_yaml().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("report:", "  tf32:", "  freeze:"))] + ["gone: 3\n"]
    assert len(older) == len(lines) - 2
    (tmp_path / "config.yaml").write_text("".join(older))
    assert was_begun(tmp_path)


@pytest.mark.parametrize(
    "mine",
    [
        CocoTrainingConfig().as_yaml() + "# to do: more epochs\n",
        CocoTrainingConfig().as_yaml().replace("seed: 42", "seed: 42  # as before"),
        CocoTrainingConfig().as_yaml().replace("seed: 42", "\n  seed: 42"),
        "optimization:\n  epochs: 3\n",
        "12\n",
        "",
        "{",
    ],
    ids=["comment at the end", "comment in a line", "empty line", "few settings", "number", "empty", "no yaml"],
)
def test_what_somebody_wrote_is_no_configuration_of_a_run(tmp_path, mine):
    (tmp_path / "config.yaml").write_text(mine)
    assert not was_begun(tmp_path)
    keep_files(CocoTrainingConfig(output=tmp_path), None, None)
    assert (tmp_path / "config_before.yaml").read_text() == mine


def test_one_training_at_a_time_uses_a_folder_until_its_process_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another training \(process {holder.pid} on "):
            reserve(tmp_path, resume=True)
    finally:
        holder.kill()
        holder.wait()
    reserve(tmp_path)


def test_resuming_and_overwriting_exclude_each_other():
    with pytest.raises(ValueError, match="resume or overwrite, not both"):
        replace(CocoTrainingConfig(), resume=True, overwrite=True)
