"""One run of a sweep: a training, and the evaluation of what it ends with.

``python -m groupdetr_fast.analysis.run FOLDER`` makes it, or what is missing of it. The folder holds
``settings.json``, which says what to do, and ``measured.json`` when the run is done.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..build import build_criterion
from ..field_types import from_plain
from ..files import read_json, write_json
from ..losses.matcher import GroupMatcher
from ..models.registry import model_config
from ..runs.config import CocoTrainingConfig
from ..runs.config_file import to_json
from ..runs.train import train
from ..training.checkpoint import latest_checkpoint
from ..training.faults import EXIT_STOPPED, TrainingStopped
from ..training.results import RESULTS
from .distances import DistanceRecorder, read_distances
from .inference import evaluate_usages

__all__ = ["Run", "RunError", "RunResults", "execute", "main", "run_command"]

SETTINGS, MEASURED, DISTANCES = "settings.json", "measured.json", "distances.csv"
LOCK_SECONDS = 60  # for a process that was asked to stop to write its checkpoint
NO_MATTER = ("checkpoint_minutes",)  # settings of a training without a say in what comes out
DISTANCES_EVERY = 20  # steps between two records of the distances between groups


class RunError(ValueError):
    """A run that cannot be made; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """A training and how its result is evaluated; the same settings are the same run, in whichever sweep.

    Attributes:
        training: the training. Where its files go and whether it resumes is not part of the settings, and however
            often it writes a checkpoint, it is the same run.
        nms_threshold: IoU, see ``inference.suppress_duplicates``.
    """

    training: CocoTrainingConfig
    nms_threshold: float

    def __post_init__(self) -> None:
        neutral = replace(
            self.training,
            optimization=self.training.optimization.resolved(),
            output=Path(),
            resume=False,
            overwrite=False,
            eval_only=False,
            pictures=0,
            report=False,
        )
        object.__setattr__(self, "training", neutral)

    @property
    def name(self) -> str:
        """Name of the run's folder: what differs most between runs, and a digest of all settings of the training."""
        model, optimization = self.training.model, self.training.optimization
        queries = model.resolved_num_queries()
        assignment: str = self.training.assignment
        if self.training.positives is not None:
            assignment += f"-p{self.training.positives}"
        settings = _identity(to_json(self))["training"]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return (
            f"k{model.num_groups:02d}-n{queries}-{assignment}-e{optimization.epochs}-s{optimization.seed}-{digest}"
        ).replace("_", "-")

    def work(self, epochs: int) -> int:
        """How much there is to do in so many epochs, to compare runs by: their queries."""
        model = self.training.model
        return epochs * model.num_groups * model.resolved_num_queries()

    @property
    def epochs(self) -> int:
        """Epochs of the training."""
        return self.training.optimization.epochs

    def epochs_done(self, folder: Path) -> int:
        """Epochs that the run has finished in its folder; the last one is finished when it is evaluated."""
        rows = (read_json(folder / RESULTS) or {}).get("epochs", [])
        if not rows:
            return 0
        done = rows[-1]["epoch"]
        return done - 1 if done == self.epochs and "metrics" not in rows[-1] else done

    def is_done(self, folder: Path) -> bool:
        """Whether the folder holds the complete results of this very run."""
        return (
            _identity(read_json(folder / SETTINGS) or {}) == _identity(to_json(self))
            and self.epochs_done(folder) == self.epochs
            and (read_json(folder / MEASURED) or {}).get("nms_threshold") == self.nms_threshold
        )

    def prepare(self, folder: Path) -> None:
        """Write the settings that :func:`execute` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, to_json(self))


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a run of these settings this run."""
    training = settings.get("training", {})
    return settings | {"training": {name: training[name] for name in training if name not in NO_MATTER}}


@dataclass(frozen=True)
class RunResults:
    """What a finished run has left in its folder.

    Attributes:
        epochs: as in ``results.json`` of the training: losses, metrics, seconds and peak memory of every epoch.
        usages: metrics of the last checkpoint, see ``inference.evaluate_usages``.
        distances: see ``distances.DistanceRecorder``; empty for a run with one group, with queries without positions,
            or with ``groups_per_pass``.
        checkpoint: folder of the last checkpoint; None if it is gone.
    """

    epochs: list[dict[str, Any]]
    usages: dict[str, dict[str, Any]]
    distances: list[dict[str, float]]
    checkpoint: Path | None

    @classmethod
    def read(cls, folder: Path) -> "RunResults":
        """Read a finished run's folder."""
        return cls(
            read_json(folder / RESULTS)["epochs"],
            read_json(folder / MEASURED)["usages"],
            read_distances(folder / DISTANCES),
            latest_checkpoint(folder),
        )

    def weights(self) -> Path:
        """The last checkpoint, where a measurement needs it."""
        if self.checkpoint is None:
            raise RunError("a finished run has no checkpoint: remove its folder, and the same command makes it again")
        return self.checkpoint


def execute(folder: Path) -> None:
    """Make the run whose settings are in ``folder``, or what is missing of it.

    Raises:
        RunError: if another process is at it, or the settings cannot be read.
    """
    try:
        run = from_plain(Run, read_json(folder / SETTINGS) or {}, complete=True)
    except ValueError as error:
        raise RunError(f"{folder / SETTINGS}: {error}: start the sweep again, which writes this file") from None
    try:
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            if run.epochs_done(folder) < run.epochs:
                _train(run, folder)
            _measure(run, folder)
    except Timeout:
        raise RunError(f"another process is at work in {folder}") from None


def _train(run: Run, folder: Path) -> None:
    config = replace(run.training, output=folder, resume=latest_checkpoint(folder) is not None)
    recorder = None
    # The distances need all groups of a batch at once.
    if config.model.num_groups > 1 and not config.optimization.groups_per_pass:
        matcher = build_criterion(model_config(config.model.model)).matcher
        if isinstance(matcher, GroupMatcher):
            matcher = replace(matcher, assignment="group", positives=None)
            recorder = DistanceRecorder(folder / DISTANCES, matcher, DISTANCES_EVERY)
    train(config, observe=recorder)


def _measure(run: Run, folder: Path) -> None:
    last = latest_checkpoint(folder)
    if last is None:
        raise RunError(f"{folder} has no checkpoint of its training: remove it, and the sweep makes the run again")
    usages = evaluate_usages(run.training, last, run.nms_threshold)
    for checkpoint in last.parent.glob("epoch_*"):
        if checkpoint != last:
            shutil.rmtree(checkpoint)
    write_json(folder / MEASURED, {"nms_threshold": run.nms_threshold, "usages": usages})


def run_command(folder: Path) -> list[str]:
    """The command that makes the run of a folder."""
    return [sys.executable, "-m", "groupdetr_fast.analysis.run", str(folder)]


def main(folder: Path) -> None:
    """Make a run, and end the process as ``groupdetr`` does."""
    try:
        execute(folder)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m groupdetr_fast.analysis.run FOLDER")
    main(Path(sys.argv[1]))
