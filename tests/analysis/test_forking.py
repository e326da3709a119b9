"""Runs as forks of one process that has imported everything."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from run_outcomes import outcome
from run_processes import has_ended, wait_for

from groupdetr_fast.analysis import forking, sweep
from groupdetr_fast.analysis.forking import ForkedRun, ForkError, ForkServer, forks_are_safe
from groupdetr_fast.analysis.run import Run, execute
from groupdetr_fast.training.faults import EXIT_STOPPED

pytestmark = [
    pytest.mark.skipif(not forks_are_safe(), reason="forks are used on Linux alone"),
    pytest.mark.usefixtures("one_thread"),
]


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
        shown = process.environ()  # of its beginning, as the system has it
        assert shown.get("A_VARIABLE") is None
        assert shown["OMP_NUM_THREADS"] == shown["RAYON_NUM_THREADS"] == "1"
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


def test_what_a_run_printed_has_its_warnings_once(server, training, tmp_path):
    diverging = replace(training, max_skipped_steps=0)
    prepared(diverging, tmp_path / "run", lr=1e30, backbone_lr=1e30)
    assert server.start(tmp_path / "run", tmp_path / "log.txt", {}).wait(120) == 1
    warning = "epoch 1, batches 2 to 2: the loss is not finite: step skipped"
    assert (tmp_path / "run" / "train.log").read_text().count(warning) == 1
    printed = (tmp_path / "log.txt").read_text()
    assert printed.count(warning) == 1
    assert printed.strip().splitlines()[-1].startswith("error: 1 steps of epoch 1 had a loss or a gradient")


def test_a_run_gets_variables_of_its_own(server, training, tmp_path):
    """As which GPU it is to see."""
    prepared(training, tmp_path / "run", precision="no")
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # which does not go with precision no
    assert server.start(tmp_path / "run", tmp_path / "log.txt", environment).wait(60) == 1
    assert "bf16" in (tmp_path / "log.txt").read_text()
    assert server.start(tmp_path / "run", tmp_path / "log.txt", {}).wait(120) == 0


def begun(folder):
    return list((folder / "checkpoints").glob("epoch_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_with_a_checkpoint_and_not_the_server(server, training, tmp_path, number):
    assert server.start(tmp_path / "none", tmp_path / "none.txt", {}).wait(60) == 1  # all is imported
    server._process.send_signal(number)
    prepared(training, tmp_path, epochs=10_000)
    process = server.start(tmp_path, tmp_path / "log.txt", {})
    wait_for(lambda: begun(tmp_path))
    process.send_signal(number)
    assert process.wait(60) == EXIT_STOPPED
    assert "stopped as asked" in (tmp_path / "log.txt").read_text()


def test_signals_to_all_processes_do_not_end_a_server_that_imports(tmp_path):
    """To the group of those that a terminal has started, and to each by itself, as a scheduler sends them."""
    code = f"""
import signal
from pathlib import Path
from groupdetr_fast.analysis.forking import ForkServer
signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
for number in signals:
    signal.signal(number, lambda *_: None)
server = ForkServer(threads=1)
for number in signals[:2]:
    server._process.send_signal(number)
print("begun", flush=True)
input()
print(server.start(Path({str(tmp_path / "none")!r}), Path({str(tmp_path / "log.txt")!r}), {{}}).wait(60))
server.close()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
        printed, said = process.communicate("\n", timeout=120)
    assert printed == "1\n", said  # there are no settings


def test_no_signal_to_a_run_that_has_just_begun_is_lost(server, training, tmp_path):
    prepared(training, tmp_path, epochs=10_000)
    for number in (signal.SIGTERM, signal.SIGINT) * 3:
        process = server.start(tmp_path, tmp_path / "log.txt", {})
        process.send_signal(number)
        assert process.wait(120) is not None  # many epochs before the run would end by itself


def test_a_log_is_a_file_that_is_not_executed(server, tmp_path):
    assert server.start(tmp_path / "none", tmp_path / "log.txt", {}).wait(60) == 1
    assert (tmp_path / "log.txt").stat().st_mode & 0o111 == 0


def of_no_server(code):
    """A process, and a run that is this process and whose server has ended."""

    def ask(**request):
        raise ForkError("the process that starts runs has ended")

    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process, ForkedRun(SimpleNamespace(ask=ask), process.pid)


def test_a_run_that_has_ended_is_not_asked_to_stop():
    process, run = of_no_server("print()")
    process.communicate()
    run.terminate()
    run.kill()
    own = ForkedRun(None, os.getpid())
    own.returncode = 0  # and its number is another process's now
    own.terminate()
    own.kill()


@pytest.mark.parametrize("obeys", [True, False])
def test_a_run_is_stopped_without_its_server(monkeypatch, obeys):
    monkeypatch.setattr(sweep, "STOP_SECONDS", 60 if obeys else 0.2)
    handler = "lambda *_: time.sleep(0.5) or sys.exit()" if obeys else "signal.SIG_IGN"
    code = f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print(flush=True); time.sleep(60)"
    process, run = of_no_server(code)
    sweep._Worker("run", run, None).stop()
    if obeys:
        assert not psutil.pid_exists(process.pid)  # it was waited for, by this process, whose child it is
    else:
        assert process.wait(10) == -signal.SIGKILL
    process.stdout.close()


def test_a_program_that_a_run_becomes_ends_with_its_server():
    """Like the one that begins again because CUDA cannot be used."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            server = os.getpid()
            if (pid := os.fork()) == 0:
                forking._end_with(server)
                os.write(writing, b"%d\n" % os.getpid())
                os.execv("/bin/sleep", ["sleep", "60"])
            os.waitpid(pid, 0)
        finally:
            os._exit(1)  # whatever happens, this is no second pytest
    os.close(writing)
    with os.fdopen(reading) as pipe:
        run = psutil.Process(int(pipe.readline()))
        wait_for(lambda: run.name() == "sleep")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(lambda: has_ended(run), seconds=20)


def test_a_server_ends_without_taking_down_what_it_has_imported(monkeypatch):
    """Its runs hear by its end that they are to stop."""
    statuses = []

    def end(status):
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with forking._signals_blocked(), pytest.raises(SystemExit):
        forking._serve()
    assert statuses == [0]


@pytest.mark.slow
def test_a_run_does_not_outlive_its_server(training, tmp_path):
    server = ForkServer(threads=1)
    prepared(training, tmp_path, epochs=10_000)
    process = server.start(tmp_path, tmp_path / "log.txt", {})
    wait_for(lambda: begun(tmp_path))
    run = psutil.Process(process.pid)
    server._process.kill()
    wait_for(lambda: has_ended(run))
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
