"""The pool of processes, with runs that only pretend to train."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from groupdetr_fast.analysis import sweep
from groupdetr_fast.analysis.forking import ForkedRun, ForkError
from groupdetr_fast.analysis.run import Run
from groupdetr_fast.analysis.sweep import SweepError, run_sweep
from groupdetr_fast.training.faults import TrainingStopped

# Stands in for groupdetr_fast.analysis.run: "trains" one epoch after the other and notes when it started and ended. The
# second epoch waits while the file NAME.held is there.
PRETENDER = """
import json, os, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())
optimization = settings["training"]["optimization"]
note = (folder.parent / "notes.txt").open("a")
threads = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")]
print("start", folder.name, *threads, file=note, flush=True)
ballast = bytearray({ballast})
if optimization["seed"] == {failing}:
    sys.exit("error: no luck")
results = folder / "results.json"
done = json.loads(results.read_text())["epochs"] if results.is_file() else []
held, begun = folder.parent / f"{{folder.name}}.held", time.monotonic()
for epoch in range(len(done) + 1, optimization["epochs"] + 1):
    time.sleep({seconds})
    while epoch == 2 and held.exists() and time.monotonic() < begun + 60:
        time.sleep(0.01)
    done.append({{"epoch": epoch, "seconds": 1.0, "peak_memory_mib": 1.0, "metrics": {{}}}})
    results.write_text(json.dumps({{"epochs": done}}))
(folder / "measured.json").write_text(json.dumps({{"nms_threshold": settings["nms_threshold"], "usages": {{}}}}))
print("end", folder.name, file=note, flush=True)
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that sets how runs pretend to train."""
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "forks_are_safe", lambda: False)  # of another program

    def pretend(seconds=0.0, failing=-1, ballast=0):
        script = tmp_path / "pretender.py"
        script.write_text(PRETENDER.format(seconds=seconds, failing=failing, ballast=ballast))
        monkeypatch.setattr(sweep, "run_command", lambda folder: [sys.executable, str(script), str(folder)])

    pretend()
    return pretend


@pytest.fixture
def runs(training):
    return [Run(replace(training, optimization=replace(training.optimization, seed=seed)), 0.7) for seed in range(1, 4)]


def notes(folder):
    return [line.split() for line in (folder / "notes.txt").read_text().splitlines()]


def pretenders():
    """Processes of runs that are at work."""
    return [child for child in psutil.Process().children() if "pretender.py" in " ".join(child.cmdline())]


def started(folder):
    return [note[1] for note in notes(folder) if note[0] == "start"]


def test_every_run_is_made_once_with_its_threads(pretend, runs, tmp_path):
    results = run_sweep([*runs, runs[0]], tmp_path / "runs", jobs=2, threads=3)
    assert sorted(started(tmp_path / "runs")) == sorted(run.name for run in runs)
    assert {tuple(note[2:]) for note in notes(tmp_path / "runs") if note[0] == "start"} == {("3", "3")}
    assert set(results) == {run.name for run in runs}
    assert [row["epoch"] for row in results[runs[0].name].epochs] == [1, 2]


def test_the_longest_runs_begin(pretend, runs, tmp_path):
    """Those with most queries, and of as many in the order in which they are given."""
    models = [replace(run.training.model, num_groups=number) for run, number in zip(runs, (2, 11, 2), strict=True)]
    runs = [Run(replace(run.training, model=model), 0.7) for run, model in zip(runs, models, strict=True)]
    run_sweep(runs, tmp_path / "runs")
    assert started(tmp_path / "runs") == [runs[1].name, runs[0].name, runs[2].name]


def test_what_is_done_is_skipped(pretend, runs, tmp_path):
    run_sweep(runs[:1], tmp_path / "runs")
    run_sweep(runs, tmp_path / "runs")
    assert started(tmp_path / "runs") == [run.name for run in runs]


def test_a_run_is_done_however_often_it_wrote_a_checkpoint(pretend, runs, tmp_path):
    run_sweep(runs[:1], tmp_path / "runs")
    again = Run(replace(runs[0].training, checkpoint_minutes=5.0), 0.7)
    assert again.name == runs[0].name
    run_sweep([again], tmp_path / "runs")
    assert started(tmp_path / "runs") == [runs[0].name]


def test_of_runs_that_have_begun_those_with_most_left_to_do_begin(pretend, runs, tmp_path):
    model = replace(runs[0].training.model, num_groups=3)
    runs = [Run(replace(runs[0].training, model=model), 0.7), *runs[1:]]
    folder = tmp_path / "runs" / runs[0].name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"epochs": [{"epoch": 1, "metrics": {}}]}))
    run_sweep(runs, tmp_path / "runs")
    assert started(tmp_path / "runs") == [runs[1].name, runs[2].name, runs[0].name]


@pytest.mark.parametrize("damage", ["unmeasured", "another threshold", "an epoch less"])
def test_what_is_incomplete_or_of_other_settings_is_made_again(pretend, runs, tmp_path, damage):
    run_sweep(runs[:1], tmp_path / "runs")
    folder = tmp_path / "runs" / runs[0].name
    again = runs[0]
    if damage == "unmeasured":
        (folder / "measured.json").unlink()
    elif damage == "another threshold":
        again = replace(again, nms_threshold=0.5)
    else:
        (folder / "results.json").write_text(json.dumps({"epochs": [{"epoch": 1}]}))
    assert again.name == runs[0].name
    assert not again.is_done(folder)
    run_sweep([again], tmp_path / "runs")
    assert again.is_done(folder)
    assert started(tmp_path / "runs") == [again.name] * 2


def test_an_interrupted_sweep_goes_on_where_it_was(pretend, runs, tmp_path, monkeypatch):
    """After its first run: that one is skipped, the second continues with the epochs that are missing."""
    folder = tmp_path / "runs"
    folder.mkdir()
    held = folder / f"{runs[1].name}.held"
    held.touch()

    def interrupt(seconds):
        time.sleep(seconds)
        if runs[1].epochs_done(folder / runs[1].name) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(runs, folder)
    monkeypatch.setattr(sweep, "time", time)
    assert not pretenders()
    held.unlink()
    assert runs[0].is_done(folder / runs[0].name)
    assert not runs[1].is_done(folder / runs[1].name)

    results = run_sweep(runs, folder)
    # Of the two that are left, the one with more to do begins.
    assert started(folder) == [runs[0].name, runs[1].name, runs[2].name, runs[1].name]
    assert [row["epoch"] for row in results[runs[1].name].epochs] == [1, 2]


def test_after_sigterm_no_run_is_left(pretend, runs, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    pretend(seconds=60)

    def terminate(seconds):
        time.sleep(seconds)
        if (folder / "notes.txt").exists() and len(started(folder)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=terminate))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="the sweep was asked to stop: the same command goes on"):
        run_sweep(runs, folder, jobs=2)
    assert not pretenders()
    assert [note[0] for note in notes(folder)] == ["start", "start"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_if_what_starts_runs_dies_no_run_is_left(pretend, runs, tmp_path, monkeypatch):
    """It is asked how the first run is once two have begun, and cannot answer any more."""
    pretend(seconds=60)
    processes = []

    class DeadServer:
        def __init__(self, threads):
            pass

        def start(self, folder, log, environment):
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(sweep.run_command(folder), env=variables))
            return ForkedRun(self, processes[-1].pid)

        def ask(self, **request):
            raise ForkError("the process that starts runs has ended")

        def close(self):
            pass

    monkeypatch.setattr(sweep, "forks_are_safe", lambda: True)
    monkeypatch.setattr(sweep, "ForkServer", DeadServer)
    with pytest.raises(ForkError, match="has ended"):
        run_sweep(runs, tmp_path / "runs", jobs=2)
    assert len(processes) == 2
    left = [process.pid for process in processes if psutil.pid_exists(process.pid)]
    for process in processes:
        process.kill()
        process.wait()
    assert left == []


def test_a_run_that_fails_does_not_stop_the_others(pretend, runs, tmp_path):
    pretend(failing=1)
    with pytest.raises(SweepError, match=rf"1 of 3 runs failed; {runs[0].name}: error: no luck \(see .*log.txt\)"):
        run_sweep(runs, tmp_path / "runs")
    assert all(run.is_done(tmp_path / "runs" / run.name) for run in runs[1:])
    pretend()
    run_sweep(runs, tmp_path / "runs")
    assert started(tmp_path / "runs")[3:] == [runs[0].name]


def test_the_memory_limit_stops_the_newest_run_until_there_is_room(pretend, runs, tmp_path, monkeypatch, caplog):
    """Each run takes 200 MiB; under a limit of 300 MiB, runs that were started together end one after the other."""
    folder = tmp_path / "runs"
    folder.mkdir()
    pretend(ballast=200 * 2**20)
    held = [folder / f"{run.name}.held" for run in runs[:2]]
    for file in held:
        file.touch()

    def go_on_once_one_is_stopped(seconds):
        time.sleep(seconds)
        if "waits until there is more memory" in caplog.text:
            for file in held:
                file.unlink(missing_ok=True)

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=go_on_once_one_is_stopped))
    run_sweep(runs[:2], folder, jobs=2, memory_gib=300 / 1024)
    happened = [(note[0], note[1]) for note in notes(folder)]
    first, second = runs[0].name, runs[1].name
    assert happened[-1] == ("end", second)
    assert happened.index(("end", first)) < len(happened) - 1 - happened[::-1].index(("start", second))


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"threads": 0}, {"memory_gib": -1.0}])
def test_wrong_limits_are_refused(runs, tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive"):
        run_sweep(runs, tmp_path / "runs", **wrong)
