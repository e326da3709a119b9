"""The folder of a run: for one training at a time, and no earlier run is lost in it unasked."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from ..training.processes import on_main_process
from .kept_files import was_begun

__all__ = ["clear", "holds_run", "reserved"]

LOCK = ".training.lock"
OF_A_RUN = (
    "checkpoints",
    "tensorboard",
    "results.json",
    "detections.json",
    "predictions.png",
    "index.html",
    "class_thresholds.json",
    "report",
    "trackers.json",
    "transforms_used.py",
    "class_weights_used.yaml",
)


@contextmanager
def reserved(accelerator: Accelerator, folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Inside, no other training may use the folder. Every process must call this; the main one holds the lock.

    Raises:
        ValueError: if another training uses the folder, or if it holds a run that is neither to be resumed nor to be
            overwritten.
    """
    lock = _Lock(folder / LOCK)

    def reserve() -> None:
        lock.acquire()
        if holds_run(folder) and not (resume or overwrite):
            raise ValueError(
                f"{folder} holds a run: give resume to go on with it, overwrite to replace it, or another output"
            )

    try:
        on_main_process(accelerator, reserve)
        yield
    finally:
        lock.release()


def clear(folder: Path) -> None:
    """Remove what an earlier run has written into its folder; other files stay, and all of them where none was."""
    if not (holds_run(folder) or was_begun(folder)):
        return
    for name in OF_A_RUN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def holds_run(folder: Path) -> bool:
    """Whether a folder has results or a checkpoint of a run."""
    return (folder / "results.json").exists() or any((folder / "checkpoints").glob("epoch_*"))


class _Lock:
    """A lock that the system releases when its process ends, however it ends.

    Record locks, unlike those of ``flock``, are not inherited: workers that outlive a killed training by some seconds
    do not hold it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            raise ValueError(
                f"{self.path.parent} is in use by another training ({holder}): wait for its end, or give another output"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
