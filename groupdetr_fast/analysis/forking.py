"""Processes that have imported everything when they begin.

To import torch and what a training needs takes longer than a small run's epoch on a GPU. So one process imports it, and
does nothing else: each run is made by a fork of it, which is a process of its own all the same, with its own memory,
random numbers and CUDA context. The process that is forked never touches CUDA, which would not survive.

``python -m groupdetr_fast.analysis.forking`` is that process. It takes a line of json for each request, and answers
with one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["ForkError", "ForkServer", "ForkedRun", "forks_are_safe"]

FOLLOW_SECONDS = 1.0  # between two looks at whether a run's sweep is still there
POLL_SECONDS = 0.05  # while a run is waited for
# What Python does at these signals by itself.
SIGNALS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class ForkError(ValueError):
    """The process that is forked has ended."""


def forks_are_safe() -> bool:
    """Whether this system's libraries work in forks: Linux, but neither macOS nor Windows."""
    return sys.platform == "linux"


class ForkServer:
    """The process that is forked, and what is asked of it.

    Args:
        threads: CPU threads of each run.
    """

    def __init__(self, threads: int):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),  # which is read when libraries are loaded
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # an import that asks whether there are GPUs is not to initialise one
        }
        command = [sys.executable, "-m", "groupdetr_fast.analysis.forking"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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


def _serve() -> Path:
    """Answer requests until there are no more. Returns in each fork, with the folder of its run."""
    own = os.getpid()
    for number in SIGNALS:  # which terminals and schedulers send to all: this process ends after those that ask it
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            answer = _status(request["ended"])
        else:
            answer = os.fork()
            if answer == 0:
                return _become(request, own)
        print(json.dumps(answer), flush=True)
    sys.exit()


def _status(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(request: dict[str, Any], parent: int) -> Path:
    """Let this process, which has just been forked, be that of a run."""
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    os.environ.update(request["environment"])
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for target, source in enumerate((nothing, log, log)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    return Path(request["folder"])


def _follow(parent: int) -> None:
    """Ask this process to stop once its parent has ended, so that no run outlives its sweep."""
    while os.getppid() == parent:
        time.sleep(FOLLOW_SECONDS)
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
