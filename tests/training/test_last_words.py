"""What several processes end with: the same sentence once, and different ones each."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from groupdetr_fast.training import last_words
from groupdetr_fast.training.last_words import first_says

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def launched(monkeypatch):
    """A function after which this process is the one of a rank, of two that a launcher with a store has started."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))

    def start(rank, restarts=0, **others):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            **others,
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.fixture
def slept(monkeypatch):
    """Pauses of a process that waits, which take no time but by the clock that it looks at; one may do something."""
    slept = SimpleNamespace(pauses=[], do=lambda: None)

    def sleep(seconds):
        slept.pauses.append(seconds)
        slept.do()

    monkeypatch.setattr(last_words, "time", SimpleNamespace(monotonic=lambda: sum(slept.pauses), sleep=sleep))
    return slept


def test_what_the_first_says_need_not_be_said_again(launched, slept):
    launched(0)
    assert not first_says("error: no Größe")
    launched(1)
    assert first_says("error: no Größe")
    assert not first_says("error: another")
    launched(1, restarts=1)  # what was said before the restart does not count
    assert not first_says("error: no Größe")


def test_the_others_wait_for_the_first_that_is_slower(launched, slept):
    launched(0)
    store = last_words._store()

    def say():
        store.set(last_words.KEY, "error")
        store.get(last_words.KEY)  # the server has it now, whoever asks

    slept.do = say
    launched(1)
    assert first_says("error")
    assert len(slept.pauses) == 1


def test_a_first_that_says_nothing_is_not_waited_for_long(launched, slept):
    launched(1)
    assert not first_says("error")
    assert sum(slept.pauses) == pytest.approx(last_words.PATIENCE, abs=2 * last_words.INTERVAL)


def test_who_is_asked_to_end_does_not_wait_but_speaks(launched, slept):
    """The launcher does so where the first was killed."""
    slept.do = lambda: signal.raise_signal(signal.SIGTERM)
    launched(1)
    assert not first_says("error")
    assert len(slept.pauses) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    "others", [{"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"WORLD_SIZE": "1"}, {"MASTER_PORT": "9"}]
)
def test_without_a_store_everybody_speaks(launched, monkeypatch, others):
    launched(0)
    assert not first_says("error")
    monkeypatch.setattr(last_words, "PATIENCE", 0.5)  # for a store that is not there
    launched(1, **others)
    assert not first_says("error")


SCRIPT = """
import os, sys
from pathlib import Path
import tyro
from groupdetr_fast import cli
from groupdetr_fast.training.faults import TrainingStopped

kind, folder = sys.argv[1:]
rank = os.environ["RANK"]

def command():
    if kind == "alike":
        raise ValueError("there is no data")
    if kind == "each":
        raise ValueError(f"process {rank} has no data")
    if kind == "second" and rank == "1":
        raise OSError("the disk of process 1 is full")
    if kind == "stopped":
        raise TrainingStopped("stopped as asked")

try:
    if kind == "box":
        tyro._errors.on_parse_error = None
    if kind in ("flag", "box"):
        cli.main(["train", "--learning-rat", "1"])
    else:
        cli.run(lambda: command)
except SystemExit as ended:
    Path(folder, rank).write_text(str(ended.code if isinstance(ended.code, int) else 1))
    raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said", "statuses"),
    [
        ("alike", {"error: there is no data": 1}, ["1", "1"]),
        ("each", {"error: process 0 has no data": 1, "error: process 1 has no data": 1}, ["1", "1"]),
        ("second", {"error: the disk of process 1 is full": 1}, [None, "1"]),
        ("flag", {"--learning-rat": 1}, ["2", "2"]),
        ("box", {"For full helptext, run groupdetr train --help": 1}, ["2", "2"]),
        ("stopped", {"stopped as asked": 1}, ["75", "75"]),
    ],
)
def test_two_processes_of_torchrun(kind, said, statuses, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, script, kind, tmp_path], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode != 0
    assert {sentence: done.stderr.count(sentence) for sentence in said} == said, done.stderr
    found = [path.read_text() if (path := tmp_path / rank).exists() else None for rank in ("0", "1")]
    assert found == statuses
