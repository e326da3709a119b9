"""The paper's tables by trainings: what is asked of ``groupdetr analyze``, in which time, and what is kept of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from groupdetr_fast.commands.analyze import parse_analysis
from groupdetr_fast.training.faults import EXIT_STOPPED
from paper import evidence
from paper.evidence import main, multi_process_service, pack, run_until, unpack
from paper.measurements import FOLDERS, MEASUREMENTS, arguments_of, in_steps

NUCLEI = ("", "_longer", "_near", "_query_rate")
PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("rehearsal", [False, True], ids=["gpu", "rehearsal"])
def test_every_command_is_understood(name, rehearsal):
    command = parse_analysis(arguments_of(name, {name: f"some/{name}" for name in FOLDERS}, rehearsal))
    settings = command.optimization
    if rehearsal:
        assert (settings.cuda_graphs, settings.epochs, command.seeds) == (0, 1, 2)
        assert (command.model.num_queries, command.model.d_model) == (15, 32)
    else:
        assert settings.precision == "bf16"
        assert bool(settings.cuda_graphs) is not command.model.predicts_masks
        assert command.seeds >= 3
        assert not command.data.resolved_workers()
    assert not command.output.is_absolute()  # for runs are named by their settings, data included
    data = next((data for data in FOLDERS if name.startswith(data)), None)
    assert command.data.train_images == (Path(f"some/{data}/images") if data else None)
    if data:  # else it would compose the digits
        assert command.training().optimization == settings  # nothing of it is refused


def test_measurements_of_nuclei_differ_in_what_they_are_named_for():
    plain, longer, near, rate = (parse_analysis(arguments_of(f"nuclei{name}")) for name in NUCLEI)
    assert (plain.groups, plain.model.model) == ((1, 3), "mask2former_r50")
    assert longer.optimization.epochs == 3 * plain.optimization.epochs
    assert (plain.model.group_init_noise, near.model.group_init_noise) == (None, 0.1)
    assert rate.optimization.query_lr == 10 * plain.optimization.lr
    for other in (near, rate):
        assert other.seeds == plain.seeds
        assert replace(other.optimization, query_lr=None) == plain.optimization
        assert replace(other.model, group_init_noise=None) == plain.model
        assert (other.data, other.augmentation) == (plain.data, plain.augmentation)


def test_tables_are_in_folders_of_their_own():
    """A sweep writes one table into its folder, which that of another measurement must not replace."""
    tables = [(measurement.folder, measurement.arguments.split()[0]) for measurement in MEASUREMENTS.values()]
    assert len(set(tables)) == len(tables)


def test_measurements_of_one_folder_share_runs():
    """Those of figure 4, figure 1 and the ablation with table 1."""
    shared = [name for name, measurement in MEASUREMENTS.items() if measurement.folder == "digits_fair"]
    commands = [parse_analysis(arguments_of(name)) for name in shared]
    assert len(commands) == 4
    first, *others = commands
    for other in others:
        assert other.optimization == first.optimization
        assert other.augmentation == first.augmentation
        assert (other.seeds, other.model.num_queries, other.evaluate_every) == (5, 45, 4)


def test_the_page_names_every_command():
    assert all(f"`{name}`" in PAGE.read_text() for name in MEASUREMENTS)


def test_half_of_the_seeds_come_first():
    assert in_steps(["a", "--seeds", "5", "b"]) == [
        ["a", "--seeds", "5", "b", "--seeds", "2"],
        ["a", "--seeds", "5", "b"],
    ]
    assert in_steps(["--seeds", "5", "--seeds", "1"]) == [["--seeds", "5", "--seeds", "1"]]
    assert in_steps(["a"]) == [["a"]]


def python(program):
    return [sys.executable, "-c", program]


STOPPABLE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_command_is_asked_to_stop_in_time(monkeypatch):
    monkeypatch.setattr(evidence, "STOP_SECONDS", 20)
    assert run_until(python("import os, sys; sys.exit(int(os.environ['X']))"), {"X": "3"}, time.monotonic() + 60) == 3
    start = time.monotonic()
    assert run_until(python(STOPPABLE), {}, start + 22) == 75
    assert time.monotonic() - start < 20


def test_a_command_that_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(evidence, "STOP_SECONDS", 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert run_until(python(deaf), {}, start + 2) == EXIT_STOPPED
    assert time.monotonic() - start < 20


def test_a_command_that_is_stopped_while_it_imports_goes_on_later(monkeypatch):
    monkeypatch.setattr(evidence, "STOP_SECONDS", 30)
    assert run_until(python("import time; time.sleep(60)"), {}, time.monotonic() + 30) == EXIT_STOPPED


def make_run(folder, name, done):
    run = folder / "runs" / name
    (run / "checkpoints" / "epoch_0001").mkdir(parents=True)
    (run / "checkpoints" / "epoch_0001" / "model.safetensors").write_bytes(b"weights")
    for file in ("settings.json", "results.json", "log.txt", *(["measured.json"] if done else [])):
        (run / file).write_text(json.dumps({"of": name}))


def test_finished_runs_go_on_elsewhere(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    make_run(here, "done", True)
    make_run(here, "begun", False)
    (here / "sweep_groups.csv").write_text("AP\n0.5\n")
    pack(here, tmp_path / "digits.tar.gz")
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "digits.tar.gz"], capture_output=True, text=True, check=True
    ).stdout
    assert set(listed.split()) == {
        "sweep_groups.csv",
        "unfinished/begun/log.txt",
        *(f"runs/done/{name}.json" for name in ("settings", "results", "measured")),
        "runs/done/log.txt",
    }
    make_run(there, "own", True)
    unpack(tmp_path / "digits.tar.gz", there)
    assert {path.name for path in (there / "runs").iterdir()} == {"done", "own"}
    assert json.loads((there / "runs" / "done" / "measured.json").read_text()) == {"of": "done"}


@pytest.fixture
def analyze(monkeypatch, tmp_path):
    """Stands in for ``groupdetr analyze``: notes its arguments, makes a run, and ends with a status of a list."""
    statuses, calls = [], []
    monkeypatch.setattr(evidence, "ROOT", tmp_path)

    def run_until(command, environment, end):
        calls.append((command[4:], environment))
        folder = tmp_path / command[command.index("--output") + 1]
        if not (folder / "runs").exists():
            make_run(folder, "one", True)
        return statuses.pop(0) if statuses else 0

    monkeypatch.setattr(evidence, "run_until", run_until)
    return statuses, calls


def test_all_is_measured_and_packed(analyze, tmp_path):
    _, calls = analyze
    assert main(["table_1", "blood_cells", "--minutes", "9", "--results", str(tmp_path / "out"), "--jobs", "8"]) == 0
    assert [arguments[0] for arguments, _ in calls] == ["sweep-groups"] * 4
    first = [arguments[-2:] for arguments, _ in calls]
    assert first == [["--seeds", "1"], ["--jobs", "8"], ["--seeds", "2"], ["--jobs", "8"]]
    assert calls[0][1]["GROUPDETR_FAST_CACHE"] == "runs/evidence/data"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bccd.tar.gz", "digits.tar.gz"]


def test_the_last_archive_has_time_of_its_own(analyze, monkeypatch):
    ends, begun = [], time.monotonic()
    run_until = evidence.run_until
    monkeypatch.setattr(evidence, "run_until", lambda *all_of: ends.append(all_of[2]) or run_until(*all_of))
    assert main(["table_1", "--minutes", "9"]) == 0
    assert len(ends) == 2
    assert begun + 540 <= ends[0] + evidence.PACK_SECONDS <= time.monotonic() + 540


def test_half_of_the_seeds_are_packed_before_the_others_begin(analyze, monkeypatch, tmp_path):
    archive, packed = tmp_path / "out" / "digits.tar.gz", []
    run_until = evidence.run_until
    monkeypatch.setattr(evidence, "run_until", lambda *command: packed.append(archive.exists()) or run_until(*command))
    assert main(["table_1", "--minutes", "9", "--results", str(tmp_path / "out")]) == 0
    assert packed == [False, True]


def test_what_gets_no_time_is_packed_as_it_was(analyze, tmp_path):
    make_run(tmp_path / "runs" / "evidence" / "digits", "known", True)
    assert main(["table_1", "--minutes", "0", "--results", str(tmp_path / "out")]) == EXIT_STOPPED
    unpack(tmp_path / "out" / "digits.tar.gz", tmp_path / "there")
    assert (tmp_path / "there" / "runs" / "known" / "measured.json").is_file()


def test_what_is_left_is_said_by_the_exit_status(analyze, tmp_path, capsys):
    statuses, calls = analyze
    statuses += [0, EXIT_STOPPED, 0, 1]
    assert main(["table_1", "ablation", "--minutes", "9"]) == EXIT_STOPPED
    assert len(calls) == 4
    assert main(["table_1", "--minutes", "0.1"]) == EXIT_STOPPED
    assert len(calls) == 4
    assert "table_1: no time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "status"),
    [([1, EXIT_STOPPED], EXIT_STOPPED), ([EXIT_STOPPED, 1], EXIT_STOPPED), ([3, 1], 3), ([0, 0, 1], 1), ([1, 0, 0], 1)],
)
def test_a_failure_does_not_hide_that_the_line_has_to_go_on(analyze, ended, status):
    statuses, _ = analyze
    statuses += ended
    assert main(["table_1", "blood_cells", "--minutes", "9"]) == status
    assert statuses == []


def test_earlier_archives_are_where_one_begins(analyze, tmp_path):
    make_run(tmp_path / "old", "known", True)
    (tmp_path / "archives").mkdir()
    pack(tmp_path / "old", tmp_path / "archives" / "digits.tar.gz")
    main(["table_1", "--minutes", "9", "--earlier", str(tmp_path / "archives")])
    assert (tmp_path / "runs" / "evidence" / "digits" / "runs" / "known" / "measured.json").is_file()


@pytest.fixture
def mps(tmp_path, monkeypatch):
    """Stands in for the service; the programs that ran are in a file, the check of the GPU has the given status."""

    slow_check = 'test "$SLOW" != check || exec sleep 40'

    def install(status):
        control = f'said=$(cat); echo "control $1 $said" >> {tmp_path}/log; test "$1$said" != "$SLOW" || exec sleep 40'
        for name, text in {"nvidia-cuda-mps-control": control, "python": f"{slow_check}; exit {status}"}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(evidence.sys, "executable", str(tmp_path / "python"))
        return tmp_path / "log"

    return install


@pytest.mark.parametrize(("status", "served"), [(0, True), (1, False)])
def test_the_service_is_used_where_it_works(mps, status, served, capsys):
    log = mps(status)
    with multi_process_service(True, time.monotonic() + 99) as variables:
        assert set(variables) == ({"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"} if served else set())
    assert log.read_text().splitlines() == ["control -d ", "control  quit"]
    assert ("with MPS" if served else "without MPS: ") in capsys.readouterr().out


@pytest.mark.parametrize("slow", ["-d", "check", "quit"])
def test_the_service_begins_and_ends_in_time(mps, slow, monkeypatch):
    log = mps(0)
    monkeypatch.setenv("SLOW", slow)
    monkeypatch.setattr(evidence, "PACK_SECONDS", 2)
    start = time.monotonic()
    with multi_process_service(True, start + evidence.PACK_SECONDS + 2) as variables:
        assert (slow == "quit") == bool(variables)
    assert time.monotonic() - start < 35
    assert ("control  quit" in log.read_text()) == (slow != "-d")


def test_nobody_is_asked_for_the_service_who_does_not_want_it(mps):
    log = mps(0)
    with multi_process_service(False, time.monotonic() + 99) as variables:
        assert variables == {}
    assert not log.exists()
