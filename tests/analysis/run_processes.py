"""Processes of runs, and what is waited for until they have done it."""

import time

import psutil


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(process):
    """Whether it has; one whose parent is gone may remain a zombie until the system's first process takes note."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
