"""The training loop, on Hugging Face Accelerate."""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from .checkpoint import latest_checkpoint, load_training_state, save_checkpoint
from .optimization import OptimizationConfig, build_optimizer, build_scheduler

__all__ = ["Trainer", "build_accelerator"]

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two points of a TensorBoard curve


def build_accelerator(config: OptimizationConfig, run: Path, *, cpu: bool = False) -> Accelerator:
    """Devices, precision, accumulation, processes; curves go to ``run/tensorboard``. Seeds everything."""
    # Accelerate keeps precision and accumulation in globals; a second run of one process may want others.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run)),
        step_scheduler_with_optimizer=False,
    )
    set_seed(config.seed)
    return accelerator


class Trainer:
    """Trains a model and keeps checkpoints, curves and results in the folder of the run.

    Args:
        accelerator: from :func:`build_accelerator`.
        model: called as ``model(images, masks, targets)``.
        criterion: called as ``criterion(output, targets)``; the result's ``"loss"`` is minimised.
        loader: yields batches with ``images``, ``masks`` and ``targets``; its sampler has ``set_epoch``.
        evaluate: called after an epoch with the model; returns metrics, of which ``"AP"`` picks the best epoch.
        config: how to train.
        run: folder of the run.
        metadata: what is needed to rebuild the model, kept in every checkpoint and in ``results.json``.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Callable[[Any, Any], dict[str, Tensor]],
        loader: Iterable,
        evaluate: Callable[[nn.Module], dict[str, Any]],
        config: OptimizationConfig,
        run: Path,
        metadata: dict[str, Any],
        *,
        evaluate_every: int = 1,
    ):
        self.accelerator = accelerator
        self.config = config.resolved()
        self.run = run
        self.metadata = metadata
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.criterion = criterion
        optimizer = build_optimizer(model, self.config)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        steps_per_epoch = -(-len(self.loader) // self.config.accumulate)
        self.scheduler = build_scheduler(self.optimizer, self.config, steps_per_epoch)
        self.step = 0
        self.epoch = 0  # epochs that have ended
        self.history: list[dict[str, Any]] = []
        self.console = Console(stderr=True)

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the run, if there is one."""
        folder = latest_checkpoint(self.run)
        if folder is None:
            return False
        model = self.accelerator.unwrap_model(self.model)
        self.epoch = load_training_state(folder, model, self.optimizer, self.scheduler)
        self.step = self.epoch * len(self.loader)
        results = self.run / "results.json"
        if results.is_file():
            self.history = [row for row in json.loads(results.read_text())["epochs"] if row["epoch"] <= self.epoch]
        logger.info("resumed %s", folder)
        return True

    def fit(self) -> dict[str, Any]:
        """Train the remaining epochs. Returns what ``results.json`` holds."""
        self.accelerator.init_trackers("tensorboard")
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  lr {task.fields[lr]:.2g}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        total = self.config.epochs * len(self.loader)
        with Progress(*columns, console=self.console, disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(
                "train", total=total, completed=self.step, epoch=self.epoch + 1, loss=float("nan"), lr=self.config.lr
            )
            while self.epoch < self.config.epochs:
                self._run_epoch(progress, task)
        self.accelerator.end_training()
        return self._results()

    def _run_epoch(self, progress: Progress, task: Any) -> None:
        begin = time.perf_counter()
        self.model.train()
        self.loader.set_epoch(self.epoch)
        sums: dict[str, Tensor] = {}
        for batch in self.loader:
            losses = self._run_step(batch)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
            self.step += 1
            progress.advance(task)
            if self.step % LOG_EVERY == 0:
                self._log_step(losses, progress, task)
        self.epoch += 1
        seconds = time.perf_counter() - begin
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "seconds": round(seconds, 2),
            "peak_memory_mib": self._peak_memory(),
        }
        row["train"] = {name: (total / len(self.loader)).item() for name, total in sums.items()}
        if self.epoch % self.evaluate_every == 0 or self.epoch == self.config.epochs:
            row["metrics"] = self.evaluate(self.model)
        self._finish_epoch(row)

    def _run_step(self, batch: Any) -> dict[str, Tensor]:
        with self.accelerator.accumulate(self.model):
            output = self.model(batch.images, batch.masks, batch.targets)
            losses = self.criterion(output, batch.targets)
            self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients and self.config.clip_norm:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
            if self.accelerator.sync_gradients:
                self.scheduler.step()
            self.optimizer.zero_grad()
        return losses

    def _log_step(self, losses: dict[str, Tensor], progress: Progress, task: Any) -> None:
        rate = self.scheduler.get_last_lr()[0]
        values = {f"train/{name}": value.item() for name, value in losses.items()}
        self.accelerator.log({**values, "train/lr": rate}, step=self.step)
        progress.update(task, epoch=self.epoch + 1, loss=values["train/loss"], lr=rate)

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        metrics = {name: value for name, value in row.get("metrics", {}).items() if isinstance(value, float)}
        self.accelerator.log({f"val/{name}": value for name, value in metrics.items()}, step=self.step)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            save_checkpoint(self.run, self.epoch, model, self.optimizer, self.scheduler, self.metadata)
            (self.run / "results.json").write_text(json.dumps(self._results(), indent=1) + "\n")
            shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75") if name in metrics)
            self.console.print(
                f"epoch {row['epoch']}/{self.config.epochs}  {row['seconds']:.0f} s  "
                f"loss {row['train']['loss']:.3f}  {shown}"
            )
        self.accelerator.wait_for_everyone()

    def _results(self) -> dict[str, Any]:
        evaluated = [row for row in self.history if "AP" in row.get("metrics", {})]
        best = max(evaluated, key=lambda row: row["metrics"]["AP"], default=None)
        return {
            **self.metadata,
            "optimization": asdict(self.config),
            "torch": torch.__version__,
            "best_epoch": best and best["epoch"],
            "epochs": self.history,
        }

    @staticmethod
    def _peak_memory() -> float:
        """Peak memory in MiB: of the GPU if there is one, else of this process."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
