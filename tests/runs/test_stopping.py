"""Ctrl-C in a training."""

import os
import signal
import time

import pytest

from groupdetr_fast.runs.train import train
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.faults import StopRequest, TrainingStopped


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # in which Python handles the signal


@pytest.fixture
def python_handles_ctrl_c():
    """Shells let what they start in the background ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_writes_a_checkpoint_and_ends_in_a_sentence(config):
    message = r"stopped as asked, .* a checkpoint is written, from which resuming goes on"
    with pytest.raises(TrainingStopped, match=message):
        train(config, observe=interrupt)
    assert latest_checkpoint(config.output) is not None
    with pytest.raises(KeyboardInterrupt):  # as before
        interrupt()


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest() as stop:
        interrupt()
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            interrupt()
