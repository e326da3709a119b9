"""A sweep of the learning rate over the beginning of a run: which rate to train with."""

import csv
import io

from ..evaluation.plots import draw_rates
from ..files import write_whole
from ..training.faults import (
    AGAIN,
    deaths_of_processes_explained,
    deaths_of_workers_explained,
    lack_of_memory_explained,
)
from ..training.rate_finder import RateSweep, SweepSettings, sweep_rate
from .config import CocoTrainingConfig
from .trainer import trainer_of

__all__ = ["find_rate"]

WITHOUT_LIMIT = 2**62  # skipped steps: the sweep ends by itself


def find_rate(config: CocoTrainingConfig, settings: SweepSettings | None = None) -> RateSweep:
    """Train with a rising rate, suggest one, and forget the weights.

    The main process prints the suggestion, and writes ``rates.csv`` and ``rates.png`` into the folder of the run, which
    may be that of a training: nothing else in it is touched.

    Args:
        config: the run; what concerns evaluation and checkpoints does not matter, and ``lr``, ``backbone_lr`` and
            ``query_lr`` only by their proportion.
        settings: where the sweep begins and ends.

    Raises:
        DataError: for a fault in the data.
        TrainingError: if memory runs out, a process dies, or the loss is not finite in the first steps.
        ValueError: for settings that do not fit together.
    """
    settings = settings or SweepSettings()
    trainer = trainer_of(config, max_skipped_steps=WITHOUT_LIMIT)
    with (
        lack_of_memory_explained(trainer.config.images_per_batch),
        deaths_of_processes_explained(AGAIN),
        deaths_of_workers_explained(trainer.state.loader.num_workers, AGAIN),
    ):
        sweep = sweep_rate(trainer, settings)
    if trainer.accelerator.is_main_process:
        _write(sweep, config)
    trainer.accelerator.end_training()
    return sweep


def _write(sweep: RateSweep, config: CocoTrainingConfig) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("lr", "loss", "smoothed"))
    writer.writerows(zip(sweep.rates, sweep.losses, sweep.smoothed, strict=True))
    write_whole(config.output / "rates.csv", table.getvalue())
    marked = {"valley": sweep.valley, "steepest": sweep.steepest}
    draw_rates(sweep.rates, sweep.losses, sweep.smoothed, marked, config.output / "rates.png")
    optimization = config.optimization
    rates = {"lr": optimization.lr, "backbone-lr": optimization.backbone_lr, "query-lr": optimization.query_lr}
    scale = sweep.valley / optimization.lr
    how = "where the loss diverged" if sweep.diverged else "and it has not diverged: a higher --rate-to may tell more"
    print(f"{len(sweep.rates)} steps, from lr {sweep.rates[0]:.2g} to {sweep.rates[-1]:.2g}, {how}")
    print("suggested:", *(f"--{name} {scale * rate:.2g}" for name, rate in rates.items() if rate is not None))
    print(f"steepest: {sweep.steepest:.2g}; picture: {config.output / 'rates.png'}")
