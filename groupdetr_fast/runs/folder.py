"""The folder of a run: for one training at a time, and no earlier run is lost in it unasked."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from ..files import read_json
from ..training.checkpoint import BEST, CHECKPOINTS
from ..training.processes import on_main_process
from ..training.results import RESULTS
from ..training.tracking import IDENTITIES
from .kept_files import CLASS_WEIGHTS_FILE, TRANSFORMS_FILE, was_begun

__all__ = [
    "DETECTIONS",
    "PAGE",
    "PICTURES",
    "PREDICTIONS",
    "THRESHOLDS",
    "clear",
    "holds_run",
    "reserved",
]

LOCK = ".training.lock"
DETECTIONS, PREDICTIONS = "detections.json", "predictions.png"  # of an evaluation
PAGE, PICTURES, THRESHOLDS = "index.html", "report", "class_thresholds.json"  # of the report
KEYS_OF_RESULTS = {"optimization", "torch", "best_epoch", "epochs"}  # which every version has written
EPOCHS = f"{CHECKPOINTS}/epoch_*"
# What is removed of a run: folders, and files. Somebody may have more in `checkpoints` and `report`.
FOLDERS_OF_A_RUN = ("tensorboard", EPOCHS, f"{CHECKPOINTS}/{BEST}", f"{CHECKPOINTS}/.*.unfinished")
FILES_OF_A_RUN = (
    RESULTS,
    DETECTIONS,
    PREDICTIONS,
    PAGE,
    THRESHOLDS,
    f"{PICTURES}/*.png",
    IDENTITIES,
    TRANSFORMS_FILE,
    CLASS_WEIGHTS_FILE,
)


@contextmanager
def reserved(accelerator: Accelerator, folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Inside, no other training may use the folder. Every process must call this; the main one holds the lock.

    Raises:
        ValueError: if another training uses the folder, if it holds a run that is neither to be resumed nor to be
            overwritten, or if it has a ``results.json`` of something else, which the training would replace.
    """
    lock = _Lock(folder / LOCK)

    def reserve() -> None:
        lock.acquire()
        if holds_run(folder) and not (resume or overwrite):
            raise ValueError(
                f"{folder} holds a run: give resume to go on with it, overwrite to replace it, or another output"
            )
        if (folder / RESULTS).exists() and not _has_results(folder):
            raise ValueError(
                f"{folder / RESULTS} was not written by a run, and a training would replace it: give it another name, "
                "or the training another output"
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
    for path in _folders(folder, FOLDERS_OF_A_RUN):
        if path.is_symlink():  # what it leads to stays
            path.unlink()
        else:
            shutil.rmtree(path)
    for path in [path for pattern in FILES_OF_A_RUN for path in folder.glob(pattern) if path.is_file()]:
        path.unlink()
    for path in _folders(folder, (CHECKPOINTS, PICTURES)):
        if not (path.is_symlink() or any(path.iterdir())):
            path.rmdir()


def holds_run(folder: Path) -> bool:
    """Whether a folder has results or a checkpoint of a run, and not just files of somebody else by these names."""
    return _has_results(folder) or bool(_folders(folder, [EPOCHS]))


def _has_results(folder: Path) -> bool:
    results = read_json(folder / RESULTS)
    return isinstance(results, dict) and results.keys() >= KEYS_OF_RESULTS


def _folders(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_dir()]


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
