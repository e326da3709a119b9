"""Where the curves of a training go besides ``results.json``: one or several trackers, through Accelerate."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import Tensor

from ..files import read_json, write_json

__all__ = ["IDENTITIES", "TrackerName", "check_trackers", "log_picture", "start_trackers"]

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]

PROJECT = "groupdetr_fast"
IDENTITIES = "trackers.json"  # in the folder of a run: what each tracker calls it


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers of these names; none for "none".

    Raises:
        ValueError: for an unknown name, "none" beside others, or one whose package is not installed.
    """
    for name in names:
        if name not in get_args(TrackerName):
            raise ValueError(f"track must be of {', '.join(get_args(TrackerName))}; got {name!r}")
    if "none" in names:
        if len(names) > 1:
            raise ValueError(f"track must be none or others, got {', '.join(names)}")
        return ()
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"track {name} needs its package: pip install {name}")
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"track {name} needs a newer Accelerate: pip install --upgrade accelerate")
    return tuple(dict.fromkeys(names))


def start_trackers(accelerator: Accelerator, names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> None:
    """Let the accelerator log to trackers. A run that is resumed goes on in each where it was.

    Args:
        accelerator: of the training; every process must call this.
        names: of the trackers, see :func:`check_trackers`. TensorBoard's curves are in the folder of the run; the
            others are configured by their own variables of the environment, and called after the folder.
        run: folder of the run.
        settings: of the run, by name, which are logged at its beginning; TensorBoard has ``config.yaml`` beside it.
    """
    names = check_trackers(names)
    identities: dict[str, str] = read_json(run / IDENTITIES) or {}
    begun = [name for name in names if name not in identities]
    trackers = [_make(name, run, identities) for name in names]
    accelerator.log_with = trackers
    accelerator.init_trackers(PROJECT)
    if not accelerator.is_main_process:
        return
    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in settings.items()
    }
    for name, tracker in zip(names, trackers, strict=True):
        if name in begun and name != "tensorboard":  # which would make folders of its own; config.yaml is there
            tracker.store_init_configuration(plain)
        if name == "mlflow":
            identities[name] = tracker.tracker.info.run_id
    write_json(run / IDENTITIES, identities)


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int, *, read: Callable[[Path], Tensor]) -> None:
    """Give a picture to those trackers that take some; the main process alone does.

    Args:
        accelerator: with trackers, see :func:`start_trackers`.
        name: of the picture in each tracker.
        path: file of the picture; nothing is done where there is none.
        step: of the training, that the picture is shown at.
        read: pixels of the file, uint8 RGB ``[3, H, W]``, for trackers that take no files.
    """
    if not accelerator.is_main_process or not path.exists():
        return
    for tracker in accelerator.trackers:
        if tracker.name == "mlflow":
            import mlflow

            mlflow.log_artifact(str(path), run_id=tracker.tracker.info.run_id)
        elif tracker.name == "trackio":
            import trackio

            tracker.tracker.log({name: trackio.Image(str(path))}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({name: _innermost_colours(read(path))[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [_innermost_colours(read(path))]}, step=step)


def _make(name: str, run: Path, identities: dict[str, str]) -> GeneralTracker:
    """A tracker that goes on with the run that ``identities`` names; if they name none, its new one is added."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        identities.setdefault(name, name)
        return kind(name, str(run))
    if name == "mlflow":
        return kind(PROJECT, run_id=identities.get(name), run_name=run.name)
    own = identities.setdefault(name, uuid.uuid4().hex[:8])
    if name == "wandb":
        return kind(PROJECT, name=run.name, dir=str(run), id=own, resume="allow")
    return kind(PROJECT, name=f"{run.name}-{own}", resume="allow")


def _innermost_colours(pixels: Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()
