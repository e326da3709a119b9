"""Where the time of a run of ``groupdetr analyze`` on the digits goes, on one core and without a GPU.

    OMP_NUM_THREADS=1 python benchmarks digits_run [--groups 5] [--steps 20] [--write]

CPU time of the process, so that other programs beside it matter little; medians of steps. Images lie in the host's
memory or on the device, which is the same memory here: what differs is what is done to them in every step. Operators
are those that the dispatcher sees, each about one kernel on a GPU; views are none.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cpu.step_host import Operators
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.demo import digits_demo
from groupdetr_fast.runs.evaluate import evaluate
from groupdetr_fast.runs.loaders import evaluation_loader, evaluation_samples, evaluation_set
from groupdetr_fast.runs.trainer import trainer_of
from harness.documents import table, write_section
from harness.places import DOCS
from harness.results import processor

__all__ = ["rows"]

T = TypeVar("T")

WARM_UP = 3
PLACES = ("host", "device")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the milliseconds of CPU time that it took."""
    begin = time.process_time()
    result = function()
    return result, 1000 * (time.process_time() - begin)


def parts(config: CocoTrainingConfig, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a run, and the operators of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output=Path(folder), pictures=0)
        trainer, start = timed(lambda: trainer_of(config))
        batches = trainer.endless_steps()
        loading, training = [], []
        for _ in range(WARM_UP + steps):
            step, loaded = timed(lambda: next(batches))
            _, trained = timed(lambda step=step: trainer.run_step(step))
            loading.append(loaded)
            training.append(trained)
        with Operators() as of_loading:
            step = next(batches)
        with Operators() as counted:
            trainer.run_step(step)
        trainer.ledger.settle()
        dataset = evaluation_set(config)
        samples = evaluation_samples(dataset, config, trainer.accelerator.device)
        loader = trainer.accelerator.prepare(evaluation_loader(samples, config))
        evaluated: Any = (trainer.accelerator, trainer.state.model, loader, dataset, config)
        return {
            "start: images, model, optimiser": start,
            "a step's images: loaded, transformed, collated, normalised": statistics.median(loading[WARM_UP:]),
            "the step itself": statistics.median(training[WARM_UP:]),
            "an evaluation": timed(lambda: evaluate(*evaluated))[1],
            "a checkpoint": timed(trainer.save)[1],
            "operators of a step": counted.number,
            "operators of its images": of_loading.number,
        }


def rows(config: CocoTrainingConfig, steps: int) -> list[list[str]]:
    """A row for each part: its name, and what it takes with images in each place."""
    measured = [parts(replace(config, data=replace(config.data, cache_on=place)), steps) for place in PLACES]
    return [[name, *(f"{each[name]:.4g}" for each in measured)] for name in measured[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=5, help="K")
    parser.add_argument("--steps", type=int, default=20, help="that count")
    parser.add_argument("--write", action="store_true", help="put the table into analysis.md")
    arguments = parser.parse_args()
    config = digits_demo()
    config = replace(config, model=replace(config.model, num_groups=arguments.groups))
    head = (
        f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}; milliseconds of CPU time, "
        f"K = {arguments.groups}, batches of {config.optimization.batch_size}."
    )
    header = ["part", *(f"`--cache-on {place}`" for place in PLACES)]
    text = f"{head}\n\n{table(header, rows(config, arguments.steps))}"
    print(text)
    if arguments.write:
        write_section(DOCS / "analysis.md", "digits_run", text)


if __name__ == "__main__":
    main()
