"""Processes that have imported everything when they begin.

To import torch and what a training needs takes longer than a small run's epoch on a GPU. So one process imports it, and
does nothing else: each run is made by a fork of it, which is a process of its own all the same, with its own memory,
random numbers and CUDA context. The process that is forked never touches CUDA, which would not survive.

``python -m groupdetr_fast.analysis.forking`` is that process. It takes a line of json for each request, and answers
with one.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["ForkError", "ForkServer", "ForkedRun", "forks_are_safe", "thread_limits"]

POLL_SECONDS = 0.05  # while a run is waited for
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Terminals and schedulers send these to all processes; here is what Python does at them by itself.
SIGNALS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class ForkError(ValueError):
    """The process that is forked has ended."""


def forks_are_safe() -> bool:
    """Whether this system's libraries work in forks: Linux, but neither macOS nor Windows."""
    return sys.platform == "linux"


def thread_limits(threads: int) -> dict[str, str]:
    """Variables for a process with so many CPU threads: those of torch, and those of the COCO metric."""
    return dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))


class ForkServer:
    """The process that is forked, and what is asked of it.

    Args:
        threads: CPU threads of each run.
    """

    def __init__(self, threads: int):
        environment = os.environ | {
            **thread_limits(threads),  # which are read when libraries are loaded
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # an import that asks whether there are GPUs is not to initialise one
        }
        command = [sys.executable, "-m", "groupdetr_fast.analysis.forking"]
        # Signals to all are for the sweep, which then stops its runs and ends this process last: it has a session of
        # its own, and begins with signals blocked, as they could end it while it imports.
        with _signals_blocked():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def start(self, folder: Path, log: Path, environment: dict[str, str]) -> "ForkedRun":
        """Make the run of a folder in a new process.

        Args:
            folder: of the run.
            log: file that what it prints is added to.
            environment: variables that it has besides.

        Raises:
            ForkError: if the process that is forked has ended.
        """
        request = {"folder": str(folder.absolute()), "log": str(log.absolute()), "environment": environment}
        return ForkedRun(self, self.ask(**request))

    def ask(self, **request: Any) -> Any:
        """The answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise ForkError(
                f"the process that starts runs has ended (exit status {self._process.wait()}): run the same command "
                "again, which goes on from here"
            )
        return json.loads(answer)

    def close(self) -> None:
        """End it; runs that are still at work stop and write a checkpoint."""
        self._process.communicate()  # nothing more, at which it ends


class ForkedRun(psutil.Process):
    """A run's process, with what ``subprocess.Popen`` has besides.

    Attributes:
        returncode: its exit status, negative for a signal; None until :meth:`poll` has seen its end.
    """

    def __init__(self, server: ForkServer, pid: int):
        super().__init__(pid)
        self.returncode: int | None = None
        self._server = server

    def terminate(self) -> None:
        """Ask it to stop, if it has not ended."""
        if self.returncode is None:
            with suppress(psutil.NoSuchProcess):
                super().terminate()

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.returncode is None:
            with suppress(psutil.NoSuchProcess):
                super().kill()

    def poll(self) -> int | None:
        """Its exit status if it has ended, else None."""
        if self.returncode is None:
            self.returncode = self._server.ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: if it does not come in so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(POLL_SECONDS)
        return status


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block :data:`SIGNALS` in this thread, and in processes that it starts until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve() -> Path:
    """Answer requests until there are no more. Returns in each fork, with the folder of its run."""
    own = os.getpid()
    # This process ends after those that ask it. A fork has them blocked, too, and so loses none that is sent to it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            answer = _status(request["ended"])
        else:
            answer = os.fork()
            if answer == 0:
                return _become(request, own)
        print(json.dumps(answer), flush=True)
    # To take down all that is imported takes a second or more, in which runs would not know that they are to stop.
    os._exit(0)


def _status(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(request: dict[str, Any], parent: int) -> Path:
    """Let this process, which has just been forked, be that of a run."""
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    _end_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ.update(request["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for target, source in enumerate((nothing, log, log)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    return Path(request["folder"])


def _end_with(parent: int) -> None:
    """Let the system ask this process to stop once its parent has ended, so that no run outlives its sweep.

    That holds for a program that is executed in this process, too.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def _main() -> None:
    from .run import main, run_command  # what takes long to import

    folder = _serve()
    if torch.cuda._is_in_bad_fork():  # something has touched CUDA when it was imported: import it all once more
        command = run_command(folder)
        os.execv(command[0], command)
    main(folder)


if __name__ == "__main__":
    _main()
