"""The training loop, on Hugging Face Accelerate."""

import itertools
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..targets import StepTotals
from .checkpoint import CheckpointError, mark_best, read_checkpoint, resumable_checkpoints, save_checkpoint, write_whole
from .ema import AveragedWeights
from .faults import StopRequest, TrainingError, TrainingStopped
from .optimization import OptimizationConfig, build_optimizer, build_scheduler
from .passes import GroupPasses, add_losses, average_gradients
from .random_state import random_state, random_state_kept, restore_random_state
from .recompute import recompute_decoder_layers
from .selection import best_epoch, epochs_without_gain
from .sharding import gathered, sharded_like, sharded_optimizer_state, whole

__all__ = ["Trainer", "build_accelerator"]

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two points of a TensorBoard curve
WORKER_DIED = "DataLoader worker (pid"  # what torch's errors begin with when a worker was killed


def build_accelerator(config: OptimizationConfig, run: Path, *, cpu: bool = False) -> Accelerator:
    """Devices, precision, processes; curves go to ``run/tensorboard``. Seeds everything.

    Raises:
        ValueError: for fp16 without a GPU, where Accelerate would train in float32 and say nothing.
    """
    if config.precision == "fp16" and (cpu or not torch.accelerator.is_available()):
        raise ValueError("precision fp16 needs a GPU; on the CPU use bf16 or no")
    # Accelerate keeps its precision in globals; a second run of one process may want another.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        # Without an accelerator, Accelerate would take the processes of a launcher for so many single ones.
        cpu=cpu or not torch.accelerator.is_available(),
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run)),
        step_scheduler_with_optimizer=False,
    )
    set_seed(config.seed)
    return accelerator


@dataclass
class EpochState:
    """How far an epoch has come.

    Attributes:
        batches: that have ended, of this process.
        steps: optimiser steps that were taken.
        skipped: optimiser steps that were not, since the loss or the gradient was not finite.
        seconds: spent so far.
        sums: losses summed over the steps that were taken.
    """

    batches: int = 0
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)


class Trainer:
    """Trains a model and keeps checkpoints, curves and results in the folder of the run.

    A run that was interrupted at any moment and resumed ends with the weights of one that was not: on one CPU process,
    bit for bit. For that, only optimiser steps draw from the random generators; whatever else does, such as an
    evaluation, leaves them as they were.

    Args:
        accelerator: from :func:`build_accelerator`.
        model: called as ``model(images, masks, targets)``.
        criterion: called as ``criterion(output, targets, totals)``; the result's ``"loss"`` is minimised.
        loader: yields batches with ``images``, ``masks``, ``targets`` and ``image_ids``; its sampler has ``set_epoch``,
            and what it yields follows from the epoch. Its data set may have ``unreadable``, the
            indices of samples that could not be read, whose number is reported, and ``remember`` to be told them.
        evaluate: called after an epoch with the model; returns metrics, of which ``"AP"`` picks the best epoch.
        config: how to train.
        run: folder of the run.
        metadata: what is needed to rebuild the model, kept in every checkpoint and in ``results.json``.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        early_stopping: epochs without a better AP after which the training ends; 0 to train all epochs.
        early_stopping_delta: by how much AP must rise to count as better.
        checkpoint_every: optimiser steps between two checkpoints within an epoch; 0 for none but at its end.
        max_skipped_steps: optimiser steps of one epoch whose loss or gradient may be infinite or not a number; they are
            skipped.
        observe: called as ``observe(step, model, output, targets)`` after the backward pass of every batch and before
            the weights change, with the number of the batch in the run, counted from 1, and the bare model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Callable[[Any, Any, StepTotals], dict[str, Tensor]],
        loader: DataLoader,
        evaluate: Callable[[nn.Module], dict[str, Any]],
        config: OptimizationConfig,
        run: Path,
        metadata: dict[str, Any],
        *,
        evaluate_every: int = 1,
        early_stopping: int = 0,
        early_stopping_delta: float = 0.0,
        checkpoint_every: int = 0,
        max_skipped_steps: int = 10,
        observe: Callable[[int, nn.Module, Any, Any], None] | None = None,
    ):
        self.accelerator = accelerator
        self.config = config.resolved()
        self.run = run
        self.metadata = metadata
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.early_stopping = early_stopping
        self.early_stopping_delta = early_stopping_delta
        self.checkpoint_every = checkpoint_every
        self.max_skipped_steps = max_skipped_steps
        self.observe = observe
        self.criterion = criterion
        self.sampler = loader.sampler
        if self.config.recompute_layers:
            recompute_decoder_layers(model)
        if self.config.compile:
            for part in ("encode", "decode"):  # which are all of forward, and what passes over groups call
                setattr(model, part, torch.compile(getattr(model, part)))
        self.passes = None
        if self.config.groups_per_pass:
            self.passes = GroupPasses(model, criterion, self.config.groups_per_pass)
            self._check_passes()
        _check_sharding(accelerator)
        optimizer = build_optimizer(model, self.config)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        if accelerator.process_index > 0:  # the weights are one, dropout and noise are each process's own
            set_seed(self.config.seed + accelerator.process_index)
        steps_per_epoch = -(-len(self.loader) // self.config.accumulate)
        self.scheduler = build_scheduler(self.optimizer, self.config, steps_per_epoch)
        self.average = AveragedWeights(model, self.config.ema_decay) if self.config.ema_decay else None
        self.epoch = 0  # epochs that have ended
        self.current = EpochState()  # of the epoch after those
        self.history: list[dict[str, Any]] = []
        self.stop = StopRequest()
        self.console = Console(stderr=True)

    @property
    def step(self) -> int:
        """Batches of the whole run that have ended, of this process."""
        return self.epoch * len(self.loader) + self.current.batches

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the run that can be used, if there is any.

        Raises:
            CheckpointError: if there are checkpoints, and none of them can be used.
        """
        folders = resumable_checkpoints(self.run)
        for index, folder in enumerate(folders):
            try:
                self._restore(folder)
            except CheckpointError as error:
                if index == len(folders) - 1:
                    raise
                logger.warning("%s; going back to the one before it", error)
            else:
                self._mark_best()
                logger.info("resumed %s", folder)
                return True
        return False

    def fit(self) -> dict[str, Any]:
        """Train the remaining epochs. Returns what ``results.json`` holds.

        Raises:
            TrainingStopped: after SIGTERM, once a checkpoint is written.
            TrainingError: if too many steps had to be skipped, or a process that loads images died.
            CheckpointError: if a checkpoint cannot be written.
        """
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
        quiet = not self.accelerator.is_main_process
        with self.stop, Progress(*columns, console=self.console, disable=quiet) as progress:
            task = progress.add_task(
                "train", total=total, completed=self.step, epoch=self.epoch + 1, loss=float("nan"), lr=self.config.lr
            )
            while self.epoch < self.config.epochs and not self._waited_long_enough():
                try:
                    self._run_epoch(progress, task)
                except (RuntimeError, ConnectionError, EOFError) as error:
                    broken_pipe = not isinstance(error, RuntimeError) and self.loader.num_workers > 0
                    if not (broken_pipe or str(error).startswith(WORKER_DIED)):
                        raise
                    raise TrainingError(
                        f"a process that loads images died ({error}): perhaps memory ran out, for which fewer workers "
                        "help; resuming goes on from the newest checkpoint"
                    ) from None
        self.accelerator.end_training()
        return self._results()

    def _run_epoch(self, progress: Progress, task: Any) -> None:
        current = self.current
        begin = time.perf_counter() - current.seconds
        self.model.train()
        for batches in self._steps():
            losses = self._run_step(batches)
            current.batches += len(batches)
            current.seconds = time.perf_counter() - begin
            progress.update(task, completed=self.step)
            if losses is not None and self.step // LOG_EVERY > (self.step - len(batches)) // LOG_EVERY:
                self._log_step(losses, progress, task)
            self._save_where_asked()
        self._finish_epoch()

    def _steps(self) -> Iterator[list[Any]]:
        """The batches of each optimiser step that remains in the epoch."""
        done = self.current.batches
        if done == len(self.loader):
            return
        loader = self.accelerator.skip_first_batches(self.loader, done) if done else self.loader
        loader.set_epoch(self.epoch)
        self.sampler.set_epoch(self.epoch)  # Accelerate's loaders of several processes do not pass the epoch on
        batches = iter(loader)
        with random_state_kept():  # a loader draws a seed when it starts
            first = next(batches)
        batches = itertools.chain((first,), batches)
        while step := list(itertools.islice(batches, self.config.accumulate)):
            yield step

    def _run_step(self, batches: list[Any]) -> dict[str, Tensor] | None:
        """One optimiser step. Returns its losses; None if the step had to be skipped."""
        statistics = [(buffer, buffer.clone()) for buffer in _running_statistics(self.model)]
        totals = StepTotals.of([batch.targets for batch in batches])
        parts = []
        for index, batch in enumerate(batches, start=1):
            if self.passes is not None:
                parts.append(self._add_gradients_in_passes(batch, totals))
                continue
            with nullcontext() if index == len(batches) else self.accelerator.no_sync(self.model):
                parts.append(self._add_gradients(self.step + index, batch, totals))
        if self.passes is not None:
            average_gradients(self.model.parameters())
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf))
        losses = add_losses(*parts)
        scaler = self.accelerator.scaler
        # With a scaler, gradients overflow now and then; it skips the step itself, and lowers the scale.
        broken = ~losses["loss"].isfinite() if scaler is not None else ~(losses["loss"] + norm).isfinite()
        broken = self._anywhere(broken)
        if not broken:
            self.optimizer.step()
            self.current.steps += 1
            self.current.sums = add_losses(self.current.sums, losses)
            if self.average is not None and not self.optimizer.step_was_skipped:
                self.average.update()
        else:
            for buffer, before in statistics:
                buffer.copy_(before)
            if scaler is not None:
                scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if broken:
            self._note_skipped_step(batches, parts)
        return None if broken else losses

    def _add_gradients(self, step: int, batch: Any, totals: StepTotals) -> dict[str, Tensor]:
        """Forward and backward pass of a batch. Returns its detached losses."""
        with self.accelerator.autocast():  # which FSDP's model does not have in itself
            output = self.model(batch.images, batch.masks, batch.targets)
        losses = self.criterion(output, batch.targets, totals)
        self.accelerator.backward(losses["loss"])
        if self.observe is not None:
            self.observe(step, self.accelerator.unwrap_model(self.model), output, batch.targets)
        return {name: value.detach() for name, value in losses.items()}

    def _add_gradients_in_passes(self, batch: Any, totals: StepTotals) -> dict[str, Tensor]:
        """The same, some groups at a time; this goes past the wrapper that averages gradients over processes."""
        accelerator = self.accelerator
        functions = {"backward": accelerator.backward, "autocast": accelerator.autocast}
        return self.passes(batch.images, batch.masks, batch.targets, totals, **functions)

    def _check_passes(self) -> None:
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(f"groups_per_pass needs all gradients in every process, which {kind.value} does not keep")
        if self.observe is not None:
            raise ValueError("observe needs the output of all groups at once: leave groups_per_pass at 0")

    def _note_skipped_step(self, batches: list[Any], parts: list[dict[str, Tensor]]) -> None:
        self.current.skipped += 1
        guilty = [batch for batch, part in zip(batches, parts, strict=True) if not part["loss"].isfinite()]
        what = "loss" if guilty else "gradient"
        ids = [image_id for batch in guilty or batches for image_id in batch.image_ids]
        where = f"epoch {self.epoch + 1}, batches {self.current.batches + 1} to {self.current.batches + len(batches)}"
        logger.warning("%s: the %s is not finite: step skipped; image ids %s", where, what, ids)
        if self.current.skipped > self.max_skipped_steps:
            raise TrainingError(
                f"{self.current.skipped} steps of epoch {self.epoch + 1} had a loss or a gradient that is not finite, "
                f"and {self.max_skipped_steps} are allowed; the last on the image ids {ids}: look at these images and "
                "their boxes, or lower the learning rate"
            )

    def _save_where_asked(self) -> None:
        """Write a checkpoint within the epoch if it is time for one, or if the training is to stop."""
        stop = self._asked_to_stop()
        due = self.checkpoint_every and (self.current.steps + self.current.skipped) % self.checkpoint_every == 0
        if stop or due:
            self._save()
        if stop:
            self._stop(f"in epoch {self.epoch + 1}")

    def _asked_to_stop(self) -> bool:
        received = self.stop.received
        if self.accelerator.num_processes == 1:
            return received
        return self._anywhere(torch.tensor(received, device=self.accelerator.device))

    def _stop(self, where: str) -> NoReturn:
        self.accelerator.end_training()
        raise TrainingStopped(f"stopped as asked, {where}; a checkpoint is written, from which resuming goes on")

    def _anywhere(self, flag: Tensor) -> bool:
        """Whether a flag is set in any process: so all of them skip a step or stop, or none."""
        return bool(self.accelerator.reduce(flag.float(), "sum"))

    @staticmethod
    def _over_processes(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over processes, on the CPU: the losses of all their images.

        A loss that a process lacks is 0 there, such as that of denoising queries where no image has an object.
        """
        parts = gather_object([{name: value.cpu() for name, value in losses.items()}])
        return {name: total / len(parts) for name, total in add_losses(*parts).items()}

    def _log_step(self, losses: dict[str, Tensor], progress: Progress, task: Any) -> None:
        rate = self.scheduler.get_last_lr()[0]
        values = {f"train/{name}": value.item() for name, value in self._over_processes(losses).items()}
        self.accelerator.log({**values, "train/lr": rate}, step=self.step)
        progress.update(task, epoch=self.epoch + 1, loss=values["train/loss"], lr=rate)

    def _finish_epoch(self) -> None:
        current = self.current
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "seconds": round(current.seconds, 2),
            "peak_memory_mib": self._peak_memory(),
            "skipped_steps": current.skipped,
            "unreadable_images": len(self._unreadable()),
            "train": {
                name: (total / current.steps).item() for name, total in self._over_processes(current.sums).items()
            },
        }
        if row["epoch"] % self.evaluate_every == 0 or row["epoch"] == self.config.epochs:
            averaged = nullcontext() if self.average is None else self.average.in_model()
            with random_state_kept(), averaged:
                row["metrics"] = self.evaluate(self.model)
        self.epoch, self.current = row["epoch"], EpochState()
        self.history.append(row)
        metrics = {name: value for name, value in row.get("metrics", {}).items() if isinstance(value, float)}
        self.accelerator.log({f"val/{name}": value for name, value in metrics.items()}, step=self.step)
        self._save()
        if best_epoch(self.history) is row:
            self._mark_best()
        if self.accelerator.is_main_process:
            shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75") if name in metrics)
            self.console.print(
                f"epoch {row['epoch']}/{self.config.epochs}  {row['seconds']:.0f} s  "
                f"loss {row['train'].get('loss', math.nan):.3f}  {shown}"
            )
        if self._asked_to_stop() and self.epoch < self.config.epochs:
            self._stop(f"after epoch {self.epoch}")

    def _unreadable(self) -> list[int]:
        """Indices of the samples that could not be read so far, each once, however many processes met it."""
        return sorted(set(gather_object(list(getattr(self.loader.dataset, "unreadable", [])))))

    def _waited_long_enough(self) -> bool:
        if not self.early_stopping or not self.history or "metrics" not in self.history[-1]:
            return False
        waited = epochs_without_gain(self.history, self.early_stopping_delta)
        if waited < self.early_stopping:
            return False
        if self.accelerator.is_main_process:
            self.console.print(f"stopped early after epoch {self.epoch}: no better AP for {waited} epochs")
        return True

    def _mark_best(self) -> None:
        """Let ``checkpoints/best`` have the weights of the best epoch so far."""
        best = best_epoch(self.history)
        if best is not None and self.accelerator.is_main_process:
            mark_best(self.run, best["epoch"])

    def _save(self) -> None:
        """Write a checkpoint and ``results.json``."""
        main = self.accelerator.is_main_process
        random_states = gather_object([random_state()])
        sums = self._over_processes(self.current.sums)
        unreadable = self._unreadable()
        weights = gathered(self.accelerator.unwrap_model(self.model).state_dict(), keep=main)
        optimizer = gathered(self.optimizer.state_dict(), keep=main)
        average = None if self.average is None else gathered(self.average.average, keep=main)
        self.accelerator.wait_for_everyone()
        if main:
            scaler = self.accelerator.scaler
            state = {
                "epoch": self.epoch,
                "current": {**vars(self.current), "sums": sums},
                "batches_per_epoch": len(self.loader),
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": random_states,
                "unreadable": unreadable,
                "history": json.dumps(self.history),
            }
            if average is not None:
                state |= {"weights": weights, "ema_updates": self.average.updates}
                weights = average
            save_checkpoint(self.run, self.epoch, self.current.batches, weights, state, self._description())
            write_whole(self.run / "results.json", json.dumps(self._results(), indent=1) + "\n")
        self.accelerator.wait_for_everyone()

    def _description(self) -> dict[str, Any]:
        """The metadata, with what the weights have been through: finished epochs, and AP if these are evaluated."""
        last = self.history[-1] if self.history and not self.current.batches else {}
        return {**self.metadata, "epoch": self.epoch, "AP": last.get("metrics", {}).get("AP")}

    def _restore(self, folder: Path) -> None:
        """Set everything that :meth:`_save` wrote.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or is of another model or training.
        """
        weights, state = read_checkpoint(folder)
        process, device = self.accelerator.process_index, self.accelerator.device
        try:
            current = EpochState(**state["current"])
            if current.batches and state["batches_per_epoch"] != len(self.loader):
                raise ValueError(
                    f"it was written within an epoch of {state['batches_per_epoch']} batches, and now an epoch has "
                    f"{len(self.loader)}: use the same data, batch_size and number of processes"
                )
            current.sums = {name: value.to(device) for name, value in current.sums.items()}
            # With averaged weights, which are those to evaluate, the trained ones are part of the state.
            model = self.accelerator.unwrap_model(self.model)
            own = model.state_dict()
            model.load_state_dict(sharded_like(state.get("weights", weights), own))
            if self.average is not None:
                self.average.restart(sharded_like(weights, own), state.get("ema_updates", 0))
            self.optimizer.load_state_dict(sharded_optimizer_state(state["optimizer"], self.optimizer))
            self.scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            random_states = state["random"]
            if process < len(random_states):
                restore_random_state(random_states[process])
            if state.get("unreadable"):
                self.loader.dataset.remember(state["unreadable"])
            self.history = json.loads(state["history"])
            self.epoch, self.current = state["epoch"], current
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {folder} does not belong to this training: {reason}") from None

    def _results(self) -> dict[str, Any]:
        best = best_epoch(self.history)
        return {
            **self.metadata,
            "optimization": asdict(self.config),
            "torch": torch.__version__,
            "peak_memory_mib": max((row["peak_memory_mib"] for row in self.history), default=None),
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


def _check_sharding(accelerator: Accelerator) -> None:
    """Refuse what checkpoints cannot be made of, and let FSDP compute in the precision of all other trainings."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(f"weights are sharded by FSDP version 2 alone, not by {kind.value}: set fsdp_version to 2")
    if accelerator.is_fsdp2:
        # FSDP would cast the weights and, with them, reference points and boxes; autocast leaves those in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """What a forward pass changes in a model that trains: the statistics of its batch norms."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms if norm.training for buffer in norm.buffers(recurse=False)]
