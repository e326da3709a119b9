"""Runs as forks of one process that has imported everything."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from run_outcomes import outcome

from groupdetr_fast.analysis import forking
from groupdetr_fast.analysis.forking import ForkError, ForkServer, forks_are_safe
from groupdetr_fast.analysis.run import Run, execute
from groupdetr_fast.training.faults import EXIT_STOPPED

pytestmark = pytest.mark.skipif(not forks_are_safe(), reason="forks are used on Linux alone")


def prepared(training, folder, **optimization):
    run = Run(replace(training, optimization=replace(training.optimization, **optimization)), 0.7)
    run.prepare(folder)
    return run


def test_a_fork_makes_the_run_of_a_process_of_its_own_whatever_was_made_before(server, training, tmp_path):
    seeds = {"first": 1, "second": 2}
    for name, seed in seeds.items():
        run = prepared(training, tmp_path / name, seed=seed, epochs=1)
        process = server.start(tmp_path / name, tmp_path / name / "log.txt", {"A_VARIABLE": "of this run"})
        assert process.poll() is None
        assert process.environ().get("A_VARIABLE") is None  # what the system shows is of its beginning
        assert process.memory_info().rss > 2**20
        assert process.wait(120) == 0, (tmp_path / name / "log.txt").read_text()
        assert run.is_done(tmp_path / name)
        assert "Average Precision" in (tmp_path / name / "log.txt").read_text()
    prepared(training, tmp_path / "own", seed=2, epochs=1)
    execute(tmp_path / "own")
    assert outcome(tmp_path / "second") == outcome(tmp_path / "own")
    assert outcome(tmp_path / "first") != outcome(tmp_path / "second")


def test_a_run_that_fails_leaves_the_others_alone(server, training, tmp_path):
    prepared(training, tmp_path / "bad")
    (tmp_path / "bad" / "settings.json").write_text("{}")
    prepared(training, tmp_path / "good", epochs=1)
    bad, good = (server.start(tmp_path / name, tmp_path / f"{name}.txt", {}) for name in ("bad", "good"))
    assert bad.wait(60) == 1
    assert "start the sweep again, which writes this file" in (tmp_path / "bad.txt").read_text()
    assert good.wait(120) == 0
    with pytest.raises(subprocess.TimeoutExpired):
        server.start(tmp_path / "good", tmp_path / "again.txt", {}).wait(0)


def test_a_run_gets_variables_of_its_own(server, training, tmp_path):
    """As which GPU it is to see."""
    prepared(training, tmp_path / "run", precision="no")
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # which does not go with precision no
    assert server.start(tmp_path / "run", tmp_path / "log.txt", environment).wait(60) == 1
    assert "bf16" in (tmp_path / "log.txt").read_text()
    assert server.start(tmp_path / "run", tmp_path / "log.txt", {}).wait(120) == 0


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(folder):
    return list((folder / "checkpoints").glob("epoch_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_with_a_checkpoint_and_not_the_server(server, training, tmp_path, number):
    server._process.send_signal(number)
    prepared(training, tmp_path, epochs=10_000)
    process = server.start(tmp_path, tmp_path / "log.txt", {})
    wait_for(lambda: begun(tmp_path))
    process.send_signal(number)
    assert process.wait(60) == EXIT_STOPPED
    assert "stopped as asked" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_does_not_outlive_its_server(training, tmp_path):
    server = ForkServer(threads=1)
    prepared(training, tmp_path, epochs=10_000)
    process = server.start(tmp_path, tmp_path / "log.txt", {})
    wait_for(lambda: begun(tmp_path))
    server._process.kill()
    gone, _ = psutil.wait_procs([psutil.Process(process.pid)], timeout=60)
    assert gone
    assert "stopped as asked" in (tmp_path / "log.txt").read_text()
    with pytest.raises(ForkError, match="the process that starts runs has ended"):
        server.ask(ended=process.pid)


@pytest.mark.slow
def test_imports_do_not_initialise_a_gpu():
    """Which would be of no use to a fork."""
    code = """
import torch
def refuse(*arguments):
    raise AssertionError("CUDA is initialised")
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = refuse
import groupdetr_fast.analysis.forking, groupdetr_fast.analysis.run
"""
    environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fork_that_cannot_use_cuda_begins_again(monkeypatch, tmp_path):
    monkeypatch.setattr(forking, "_serve", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    executed = []

    def execv(program, command):
        executed.append((program, command))
        sys.exit()

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        forking._main()
    assert executed == [(sys.executable, [sys.executable, "-m", "groupdetr_fast.analysis.run", str(tmp_path)])]
