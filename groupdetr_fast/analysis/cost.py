"""Time and memory of training steps, in a process of their own. ``python -m groupdetr_fast.analysis.cost FOLDER``"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..field_types import from_plain
from ..files import read_json, write_json
from ..runs.config import CocoTrainingConfig
from ..runs.config_file import to_json
from ..runs.trainer import trainer_of
from ..training.engine import Trainer
from ..training.progress import peak_memory_mib

__all__ = ["CostError", "CostSettings", "measure_cost"]

SETTINGS, COST = "settings.json", "cost.json"


class CostError(ValueError):
    """A measurement that failed; the message is what its process said last."""


@dataclass(frozen=True)
class CostSettings:
    """What is timed.

    Attributes:
        training: whose optimiser steps these are.
        warmup: steps before the first one that counts.
        steps: steps that count.
    """

    training: CocoTrainingConfig
    warmup: int
    steps: int


def measure_cost(settings: CostSettings, folder: Path, *, threads: int) -> dict[str, Any]:
    """Time training steps in a new process, so that its peak memory is that of these steps.

    Returns:
        ``seconds_per_step`` (median of optimiser steps, without loading images), ``..._p20`` and
        ``..._p80`` (percentiles), ``seconds_per_epoch`` (the median times the steps of an epoch) and
        ``peak_memory_mib`` (of the GPU if there is one, else of the process).

    Raises:
        CostError: if the process fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, to_json(settings))
    command = [sys.executable, "-m", "groupdetr_fast.analysis.cost", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise CostError(last.removeprefix("error: "))
    return read_json(folder / COST)


def _seconds_of_steps(trainer: Trainer, number: int) -> list[float]:
    """Seconds of each of so many optimiser steps, without loading images."""
    times: list[float] = []
    for batches in itertools.islice(trainer.endless_steps(), number):
        _wait()
        begin = time.perf_counter()
        trainer.run_step(batches)
        _wait()
        times.append(time.perf_counter() - begin)
    return times


def _time_steps(settings: CostSettings, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(replace(settings.training, output=folder))
    times = _seconds_of_steps(trainer, settings.warmup + settings.steps)[settings.warmup :]
    median = statistics.median(times)
    percentiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
    return {
        "seconds_per_step": median,
        "seconds_per_step_p20": percentiles[0].item(),
        "seconds_per_step_p80": percentiles[1].item(),
        "seconds_per_epoch": median * trainer.state.steps_per_epoch,
        "peak_memory_mib": peak_memory_mib(),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        write_json(folder / COST, _time_steps(from_plain(CostSettings, read_json(folder / SETTINGS)), folder))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
