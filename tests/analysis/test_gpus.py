"""Runs that share GPUs: a stand-in for nvidia-smi counts what the runs, which only pretend to train, say they take."""

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from groupdetr_fast.analysis import gpus, sweep
from groupdetr_fast.analysis.gpus import GpuError, shared_gpus
from groupdetr_fast.analysis.run import Run
from groupdetr_fast.analysis.sweep import SweepError, default_jobs, run_sweep
from groupdetr_fast.data import device_images
from groupdetr_fast.data.device_images import CacheRefused

GIB = 2**30
# Of 1000 MiB on each GPU, 100 are another program's, and each run takes what its settings say while it is at work.
NVIDIA_SMI = """#!{python}
import sys
from pathlib import Path

folder = Path({folder!r})
gpu = sys.argv[sys.argv.index("-i") + 1]
used = 100
for file in folder.glob(f"gpu{{gpu}}-*"):
    try:
        used += int(file.read_text() or 0)
    except FileNotFoundError:  # the run has just ended
        pass
print(used, 1000, sep=", ")
"""
# "Trains" epoch after epoch, the second when the file held is gone; fails like torch where the GPU has less left than
# it takes.
PRETENDER = """
import json, os, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())
gpu, taken = os.environ["CUDA_VISIBLE_DEVICES"], {mib}
assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
memory = folder.parent / f"gpu{{gpu}}-{{folder.name}}"
memory.write_text(str(taken))
others = [file for file in folder.parent.glob(f"gpu{{gpu}}-*") if file != memory]
used = taken * (1 + len(others))
notes = (folder.parent / "notes.txt").open("a")
held, begun = folder.parent / "held", time.monotonic()
try:
    if 100 + used > {capacity}:
        print("failed", folder.name, gpu, len(others), file=notes, flush=True)
        sys.exit({last_words!r})
    shown = len(list(folder.parent.glob("*/results.json")))  # runs that have trained an epoch
    print("start", folder.name, gpu, len(others), file=notes, flush=True)
    print("shown", folder.name, gpu, shown, file=notes, flush=True)
    results = folder / "results.json"
    done = []
    for epoch in range(1, settings["training"]["optimization"]["epochs"] + 1):
        while epoch == 2 and held.exists() and time.monotonic() < begun + 60:
            time.sleep(0.01)
        done.append({{"epoch": epoch, "seconds": 1.0, "peak_memory_mib": 1.0, "metrics": {{}}}})
        results.write_text(json.dumps({{"epochs": done}}))
    (folder / "measured.json").write_text(json.dumps({{"nms_threshold": settings["nms_threshold"], "usages": {{}}}}))
finally:
    memory.unlink()
"""

LAST_WORDS = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that sets up a number of GPUs, and what a run takes of one."""
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "forks_are_safe", lambda: False)  # of another program
    monkeypatch.setattr(sweep, "LOOK_SECONDS", 0.02)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(NVIDIA_SMI.format(python=sys.executable, folder=str(tmp_path / "runs")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    def pretend(count, mib=100, capacity=1000, last_words=LAST_WORDS):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        script = tmp_path / "pretender.py"
        script.write_text(PRETENDER.format(mib=mib, capacity=capacity, last_words=last_words))
        monkeypatch.setattr(sweep, "run_command", lambda folder: [sys.executable, str(script), str(folder)])

    return pretend


@pytest.fixture
def runs(training):
    return [Run(replace(training, optimization=replace(training.optimization, seed=seed)), 0.7) for seed in range(1, 6)]


def notes(folder, what="start"):
    lines = [line.split() for line in (folder / "notes.txt").read_text().splitlines()]
    return [(name, gpu, int(others)) for happened, name, gpu, others in lines if happened == what]


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """A function that keeps all runs in their first epoch until there are so many notes of a kind, and a bit longer."""

    def hold(number, what="start"):
        folder, polls = tmp_path / "runs", []
        folder.mkdir(exist_ok=True)
        (folder / "held").touch()

        def sleep(seconds):
            time.sleep(seconds)
            if (folder / "notes.txt").exists() and len(notes(folder, what)) >= number:
                polls.append(seconds)
            if len(polls) > 5:  # in which the sweep could start more
                (folder / "held").unlink(missing_ok=True)

        monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=sleep))

    return hold


def test_runs_share_a_gpu_once_the_first_has_shown_its_size(pretend, hold, runs, tmp_path):
    pretend(1)
    hold(4)
    run_sweep(runs, tmp_path / "runs", jobs=4)
    starts = notes(tmp_path / "runs")
    assert {gpu for _, gpu, _ in starts} == {"0"}
    assert starts[0][2] == 0
    assert max(others for _, _, others in starts) == 3
    assert notes(tmp_path / "runs", "shown")[1][2] == 1, "the second run did not wait for an epoch of the first"


def test_the_limit_of_a_gpu_holds(pretend, hold, runs, tmp_path):
    """Runs of 300 MiB under a limit of 650 MiB: never three at a time."""
    pretend(1, mib=300)
    hold(2)
    run_sweep(runs, tmp_path / "runs", jobs=5, gpu_memory_gib=650 / 1024)
    assert max(others for _, _, others in notes(tmp_path / "runs")) == 1


def test_runs_are_spread_over_gpus(pretend, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    pretend(2)
    run_sweep(runs, tmp_path / "runs", jobs=2)
    assert {gpu for _, gpu, _ in notes(tmp_path / "runs")} == {"3", "5"}


def test_a_full_gpu_does_not_keep_others_from_runs(pretend, hold, runs, tmp_path):
    """Another program leaves room for one run on the first GPU, and the second has room for four."""
    pretend(2, mib=200)
    hold(5)
    (tmp_path / "runs" / "gpu0-other").write_text("600")
    run_sweep(runs, tmp_path / "runs", jobs=5)
    most = {gpu: max(others for _, where, others in notes(tmp_path / "runs") if where == gpu) for gpu in "01"}
    assert most == {"0": 1, "1": 3}  # the other program, and three runs


def refusal_of_images(monkeypatch):
    """What a run says last whose images would take more than half of what others have left."""
    monkeypatch.setattr(device_images, "_free_memory", lambda device: 1000)
    with pytest.raises(CacheRefused) as refused:
        device_images._check_room(501, 10, torch.device("cuda"))
    return f"error: {refused.value}"


@pytest.mark.parametrize("place", ["step", "images"])
def test_a_run_without_memory_beside_others_is_made_again_with_fewer(pretend, hold, runs, tmp_path, monkeypatch, place):
    """The limit lets three runs in; the GPU has room for two."""
    last_words = LAST_WORDS if place == "step" else refusal_of_images(monkeypatch)
    pretend(1, mib=300, capacity=750, last_words=last_words)
    hold(1, "failed")
    results = run_sweep(runs, tmp_path / "runs", jobs=5, gpu_memory_gib=1)
    assert set(results) == {run.name for run in runs}
    failed = notes(tmp_path / "runs", "failed")
    assert failed
    assert all(others >= 1 for _, _, others in failed)


def test_a_run_without_memory_alone_fails(pretend, runs, tmp_path):
    pretend(1, mib=950)
    with pytest.raises(SweepError, match=r"1 of 1 runs failed; .*CUDA out of memory"):
        run_sweep(runs[:1], tmp_path / "runs", jobs=2)


def test_memory_that_cannot_be_read_is_an_error(pretend, runs, tmp_path, monkeypatch):
    pretend(1)
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!{sys.executable}\nprint('[N/A], [N/A]')\n")
    with pytest.raises(GpuError, match="nvidia-smi does not say how much memory of GPU 0 is in use"):
        run_sweep(runs, tmp_path / "runs", jobs=2)


def test_memory_is_read_only_where_runs_are_to_share_it(pretend, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    pretend(2)
    monkeypatch.setattr(gpus, "_memory", lambda name: pytest.fail("nvidia-smi was asked"))
    run_sweep(runs[:2], tmp_path / "runs", jobs=1)
    assert notes(tmp_path / "runs") == [(run.name, "0,1", 0) for run in runs[:2]]
    assert set(run_sweep(runs[:2], tmp_path / "runs", jobs=2)) == {run.name for run in runs[:2]}  # all are done


def test_the_default_limit_is_nine_tenths_of_what_is_free(pretend):
    pretend(1)
    (gpu,) = shared_gpus(None)
    assert gpu.memory_limit == pytest.approx((100 + 0.9 * 900) * 2**20)
    assert shared_gpus(0.5)[0].memory_limit == pytest.approx(100 * 2**20 + 0.5 * GIB)


def test_without_a_gpu_nothing_is_asked(pretend, monkeypatch):
    pretend(0)
    monkeypatch.setattr(gpus, "_memory", lambda name: pytest.fail("nvidia-smi was asked"))
    assert shared_gpus(None) == []
    assert default_jobs(0) == 2


@pytest.mark.parametrize(("workers", "jobs"), [(0, 16), (1, 8), (8, 8)])
def test_with_a_gpu_each_run_has_a_core_and_one_for_its_images(pretend, monkeypatch, workers, jobs):
    pretend(1)
    monkeypatch.setattr(sweep, "usable_cores", lambda: 16)
    assert default_jobs(workers) == jobs
