"""Table 1 at a tiny size: seven K, three seeds, with runs that share a stand-in for a GPU, killed and gone on with."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from run_outcomes import outcome
from run_processes import has_ended, wait_for

from groupdetr_fast.analysis import gpus, sweep
from groupdetr_fast.analysis.experiments import group_cells
from groupdetr_fast.analysis.run import Run, execute
from groupdetr_fast.analysis.sweep import run_sweep

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE_1 = (1, 2, 3, 5, 7, 9, 11)


@pytest.fixture
def training(training):
    """With images on the device, and a checkpoint after every step."""
    data = replace(training.data, cache_images=True, cache_on="device")
    return replace(training, data=data, checkpoint_minutes=1e-9)


def runs_of(training, groups, seeds):
    return [Run(cell.training, 0.7) for cell in group_cells(training, groups, (), range(seeds))]


def assert_as_undisturbed(runs, folder, tmp_path):
    for run in runs:
        run.prepare(tmp_path / "undisturbed" / run.name)
        execute(tmp_path / "undisturbed" / run.name)
        assert outcome(folder / run.name) == outcome(tmp_path / "undisturbed" / run.name), run.name


@pytest.fixture
def one_gpu(monkeypatch, server):
    """A GPU for the sweep to share out, with 100 MiB in use; the runs have none and train on the CPU."""
    # Lightning sets it when it is imported, and torch would then take the number below for what there is.
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpus, "_memory", lambda name: (100 * 2**20, 10_000 * 2**20))
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)
    # one for all sweeps of the tests, which saves seconds
    monkeypatch.setattr(sweep, "ForkServer", lambda threads: SimpleNamespace(start=server.start, close=lambda: None))


@pytest.mark.parametrize(
    ("groups", "seeds", "interruptions"),
    [((1, 2, 3), 1, 1), pytest.param(TABLE_1, 3, 6, marks=pytest.mark.slow)],
    ids=["small", "table 1"],
)
def test_a_sweep_that_is_interrupted_and_gone_on_with_is_one_that_is_not(
    one_gpu, training, tmp_path, monkeypatch, groups, seeds, interruptions
):
    """Each interruption comes when another run has a checkpoint within its second epoch."""
    folder, runs = tmp_path / "runs", runs_of(training, groups, seeds)
    caught = set()

    def interrupt(seconds):
        time.sleep(seconds)
        within = {path.parts[-3] for path in folder.glob("*/checkpoints/epoch_0001_batch_*")} - caught
        if within and len(caught) < interruptions:
            caught.add(within.pop())
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=interrupt))
    for _ in range(interruptions):
        with pytest.raises(KeyboardInterrupt):
            run_sweep(runs, folder, jobs=2)
    assert not all(run.is_done(folder / run.name) for run in runs)
    run_sweep(runs, folder, jobs=2)
    assert_as_undisturbed(runs, folder, tmp_path)


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_no_runs_and_is_gone_on_with(training, tmp_path):
    """``kill -9`` of the command, again and again; its runs write a checkpoint and end by themselves."""
    folder, runs = tmp_path / "analysis", runs_of(training, (1, 2, 3), 2)
    for run in runs:
        run.prepare(folder / "runs" / run.name)
    names = " ".join(run.name for run in runs)
    code = f"""
import sys
from pathlib import Path
from groupdetr_fast.analysis.run import Run
from groupdetr_fast.analysis.sweep import run_sweep
from groupdetr_fast.files import read_json
from groupdetr_fast.field_types import from_plain
folder = Path({str(folder / "runs")!r})
runs = [from_plain(Run, read_json(folder / name / "settings.json"), complete=True) for name in {names!r}.split()]
run_sweep(runs, folder, jobs=2)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    killed = 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
        done = sum(run.is_done(folder / "runs" / run.name) for run in runs)
        while process.poll() is None:
            time.sleep(0.1)
            if sum(run.is_done(folder / "runs" / run.name) for run in runs) >= done + 2:
                family = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGKILL)
                killed += 1
                wait_for(lambda family=family: all(map(has_ended, family)), seconds=30)
        if process.wait() == 0:
            break
    assert killed >= 1
    assert all(run.is_done(folder / "runs" / run.name) for run in runs)
    assert_as_undisturbed(runs, folder / "runs", tmp_path)
