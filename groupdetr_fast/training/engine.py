"""The training loop, on Hugging Face Accelerate."""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedType, ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..files import write_whole
from ..random_state import random_state_kept
from ..targets import StepTotals
from .checkpoint import mark_best
from .ema import AveragedWeights
from .faults import StopRequest, TrainingError, TrainingStopped, deaths_of_workers_explained
from .graphs import DeviceStep, Flag, StepGraphs, StepOutcome, check_graphs, running_statistics
from .optimization import OptimizationConfig, build_optimizer, build_scheduler
from .passes import GroupPasses, add_losses, average_gradients
from .processes import anywhere, mean_losses
from .progress import TrainingProgress, peak_memory_mib, reset_peak_memory
from .recompute import recompute_decoder_layers
from .selection import best_epoch, epochs_without_gain
from .sharding import check_sharding, whole
from .state import TrainingState

__all__ = ["Trainer", "TrainerSettings", "build_accelerator"]

logger = logging.getLogger(__name__)

MAX_OVERFLOWS_IN_A_ROW = (
    25  # the first scale, 2**16, has then fallen to 2**-9: it is not what makes gradients too large
)


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
        # A copy of a batch that the host waits for would wait for the step before it, which graphs leave running.
        dataloader_config=DataLoaderConfiguration(non_blocking=config.cuda_graphs > 0),
    )
    set_seed(config.seed)
    return accelerator


@dataclass(frozen=True)
class TrainerSettings:
    """How a training runs, apart from what it trains.

    Attributes:
        optimization: how to train.
        run: folder of the run.
        metadata: what is needed to rebuild the model, kept in every checkpoint and in ``results.json``.
        evaluate_every: epochs between two evaluations; the last epoch is always evaluated.
        early_stopping: epochs without a better AP after which the training ends; 0 to train all epochs.
        early_stopping_delta: by how much AP must rise to count as better.
        checkpoint_every: optimiser steps between two checkpoints within an epoch; 0 for none but at its end.
        max_skipped_steps: optimiser steps of one epoch whose loss or gradient may be infinite or not a number; they are
            skipped.
        keep_checkpoints: epochs whose weights are kept, the newest ones, besides the best; 0 for all.
    """

    optimization: OptimizationConfig
    run: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    evaluate_every: int = 1
    early_stopping: int = 0
    early_stopping_delta: float = 0.0
    checkpoint_every: int = 0
    max_skipped_steps: int = 10
    keep_checkpoints: int = 0


class Trainer:
    """Trains a model and keeps checkpoints, curves and results in the folder of the run.

    A run that was interrupted at any moment and resumed ends with the weights of one that was not: on one CPU process,
    bit for bit. For that, only optimiser steps draw from the random generators; whatever else does, such as an
    evaluation, leaves them as they were.

    :meth:`fit` is the whole training. To time or to watch steps alone, without evaluations and checkpoints::

        for batches in trainer.steps():
            losses = trainer.run_step(batches)

    Args:
        accelerator: from :func:`build_accelerator`.
        model: called as ``model(images, masks, targets)``.
        criterion: called as ``criterion(output, targets, totals)``; the result's ``"loss"`` is minimised.
        loader: yields batches with ``images``, ``masks``, ``targets`` and ``image_ids``; its sampler has ``set_epoch``,
            and what it yields follows from the epoch. Its data set may have ``unreadable``, the
            indices of samples that could not be read, whose number is reported, ``remember`` to be told them, and
            ``limit``, how many there may be over all processes.
        settings: how the training runs.
        evaluate: called after an epoch with the model; returns metrics, of which ``"AP"`` picks the best epoch. None
            not to evaluate.
        observe: called as ``observe(step, model, output, targets)`` after the backward pass of every batch and before
            the weights change, with the number of the batch in the run, counted from 1, and the bare model.

    Attributes:
        state: everything that the training changes; checkpoints hold it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Callable[[Any, Any, StepTotals], dict[str, Tensor]],
        loader: DataLoader,
        settings: TrainerSettings,
        *,
        evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
        observe: Callable[[int, nn.Module, Any, Any], None] | None = None,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.config = settings.optimization.resolved()
        self.criterion = criterion
        self.evaluate = evaluate
        self.observe = observe
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
        check_sharding(accelerator)
        if self.config.cuda_graphs:
            check_graphs(accelerator, self.config, observing=observe is not None)
        self.state = self._begin(model, loader)
        self.graphs = self._build_graphs() if self.config.cuda_graphs else None
        self._enqueued: _EnqueuedStep | None = None
        self._norm: Tensor | None = None  # of the gradient of the last step that was not a graph
        self.progress = TrainingProgress(accelerator, self.state, self.config.epochs)
        self.stop = StopRequest()

    def _begin(self, bare: nn.Module, loader: DataLoader) -> TrainingState:
        """The state before the first step."""
        config, accelerator = self.config, self.accelerator
        model, optimizer, loader = accelerator.prepare(bare, build_optimizer(bare, config), loader)
        if accelerator.process_index > 0:  # the weights are one, dropout and noise are each process's own
            set_seed(config.seed + accelerator.process_index)
        scheduler = build_scheduler(optimizer, config, steps_per_epoch=-(-len(loader) // config.accumulate))
        average = AveragedWeights(bare, config.ema_decay) if config.ema_decay else None
        return TrainingState(accelerator, model, optimizer, scheduler, average, loader, config.accumulate)

    def _build_graphs(self) -> StepGraphs:
        state = self.state
        bare = self.accelerator.unwrap_model(state.model)
        step = DeviceStep(self._add_gradients, bare, state.optimizer, state.average)
        return StepGraphs(step, self.config.graph_sizes)

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the run that can be used, if there is any.

        Raises:
            CheckpointError: if there are checkpoints, and none of them can be used.
        """
        folder = self.state.resume(self.settings.run)
        if folder is None:
            return False
        self._mark_best()
        logger.info("resumed %s", folder)
        return True

    def fit(self) -> dict[str, Any]:
        """Train the remaining epochs. Returns what ``results.json`` holds.

        Raises:
            TrainingStopped: after SIGTERM or Ctrl-C, once a checkpoint is written.
            TrainingError: if too many steps had to be skipped or too many images could not be read, or a process that
                loads images died.
            CheckpointError: if a checkpoint cannot be written.
        """
        self.accelerator.init_trackers("tensorboard")
        explained = deaths_of_workers_explained(self.state.loader.num_workers)
        with self.stop, self.progress.shown(self.config.lr), explained:
            self._evaluate_what_was_interrupted()
            while self.state.epoch < self.config.epochs and not self._waited_long_enough():
                self._run_epoch()
        self.accelerator.end_training()
        return self._results()

    def _run_epoch(self) -> None:
        current = self.state.current
        begin = time.perf_counter() - current.seconds
        self.state.model.train()
        reset_peak_memory()
        asked = time.perf_counter()
        for batches in self._steps_until_stopped():
            waited = time.perf_counter() - asked
            losses = self.run_step(batches)
            current.seconds = time.perf_counter() - begin
            images = sum(len(batch.image_ids) for batch in batches)
            self.progress.step_ended(len(batches), losses, images=images, waited=waited, norm=self._norm)
            self._save_where_asked()
            asked = time.perf_counter()
        self.finish_epoch()

    def _steps_until_stopped(self) -> Iterator[list[Any]]:
        """What :meth:`steps` gives; if a worker dies after a request to stop, that is what stops the training."""
        try:
            with deaths_of_workers_explained(self.state.loader.num_workers):
                yield from self.steps()
        except TrainingError:
            # Other processes are at other places, and a checkpoint is of all.
            if not self.stop.received or self.accelerator.num_processes > 1:
                raise
            self.save()
            self._stop_in_epoch()

    def steps(self) -> Iterator[list[Any]]:
        """The batches of each optimiser step that remains in the epoch, for :meth:`run_step`."""
        loader, done = self.state.loader, self.state.current.batches
        if done == len(loader):
            return
        if done:
            loader = self.accelerator.skip_first_batches(loader, done)
        loader.set_epoch(self.state.epoch)
        self.sampler.set_epoch(self.state.epoch)  # Accelerate's loaders of several processes do not pass the epoch on
        batches = iter(loader)
        with random_state_kept():  # a loader draws a seed when it starts
            first = next(batches)
        batches = itertools.chain((first,), batches)
        while step := list(itertools.islice(batches, self.config.accumulate)):
            yield step

    def run_step(self, batches: list[Any]) -> dict[str, Tensor] | None:
        """One optimiser step; the model must be in training mode.

        With ``cuda_graphs`` the host does not wait for the step: it sees whether the step was skipped, counts it and
        warns when the next step is enqueued, or an epoch ends or a checkpoint is written. On the device a skipped step
        has changed nothing from the beginning.

        Returns:
            Its detached losses, of this process; None if the step had to be skipped. With ``cuda_graphs`` the losses
            of a skipped step are returned too, and are not finite or have a gradient that is not.

        Raises:
            TrainingError: if too many steps had to be skipped.
        """
        outcome = None if self.graphs is None else self.graphs.run(batches)
        self._settle()
        state = self.state
        if outcome is None:
            losses = self._run_eager_step(batches)
        else:
            ids = [batch.image_ids for batch in batches]
            self._enqueued = _EnqueuedStep(state.current.batches, ids, outcome, Flag(outcome.broken))
            losses, self._norm = outcome.losses, None
            state.scheduler.step()
        if self.graphs is not None and (outcome is None or not outcome.replayed):
            state.current.without_graph += 1
        state.current.batches += len(batches)
        return losses

    def _settle(self) -> None:
        """Count the step that was enqueued last, if it has not been yet; the host waits for its end."""
        step, self._enqueued = self._enqueued, None
        if step is None:
            return
        if step.broken:
            self._note_skipped_step(step.first, step.image_ids, step.outcome.of_batches)
        else:
            self.state.current.steps += 1
            self.state.current.sums = add_losses(self.state.current.sums, step.outcome.losses)

    def _run_eager_step(self, batches: list[Any]) -> dict[str, Tensor] | None:
        """A step that the host launches kernel by kernel, and that it decides to skip. See :meth:`run_step`."""
        state = self.state
        statistics = [(buffer, buffer.clone()) for buffer in running_statistics(state.model)]
        parts, norm = self._add_gradients(batches)
        self._norm = norm
        losses = add_losses(*parts)
        scaler = self.accelerator.scaler
        # With a scaler, gradients overflow now and then; it leaves out the step itself, and lowers the scale.
        broken = ~losses["loss"].isfinite() if scaler is not None else ~(losses["loss"] + norm).isfinite()
        broken = anywhere(self.accelerator, broken)
        overflowed = False
        if not broken:
            overflowed = not self._step_optimizer()
        if not (broken or overflowed):
            state.current.steps += 1
            state.current.sums = add_losses(state.current.sums, losses)
            if state.average is not None:
                state.average.update()
        else:
            for buffer, before in statistics:
                buffer.copy_(before)
            if broken and scaler is not None:
                scaler.update()
        state.scheduler.step()
        state.optimizer.zero_grad()
        if broken:
            image_ids = [batch.image_ids for batch in batches]
            self._note_skipped_step(state.current.batches, image_ids, [part["loss"] for part in parts])
        elif scaler is not None:
            self._note_overflow(overflowed)
        return None if broken or overflowed else losses

    def _step_optimizer(self) -> bool:
        """Returns whether the weights have changed; a scaler may have left out the step."""
        scaler = self.accelerator.scaler
        if scaler is None:
            self.state.optimizer.step()
            return True
        # A fused optimiser is called either way and decides on the device: only the scale tells what the scaler found.
        before = scaler.get_scale()
        self.state.optimizer.step()
        return scaler.get_scale() >= before

    def _add_gradients(self, batches: list[Any]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Forward and backward passes of a step. Returns each batch's detached losses, and the gradient's norm."""
        totals = StepTotals.of([batch.targets for batch in batches])
        model = self.state.model
        parts = []
        for index, batch in enumerate(batches, start=1):
            if self.passes is not None:
                parts.append(self._pass_over_groups(batch, totals))
                continue
            with nullcontext() if index == len(batches) else self.accelerator.no_sync(model):
                parts.append(self._pass_over_batch(self.state.batches + index, batch, totals))
        if self.passes is not None:
            average_gradients(model.parameters())
        norm = whole(self.accelerator.clip_grad_norm_(model.parameters(), self.config.clip_norm or math.inf))
        return parts, norm

    def _pass_over_batch(self, number: int, batch: Any, totals: StepTotals) -> dict[str, Tensor]:
        """Forward and backward pass of the batch with this number in the run. Returns its detached losses."""
        with self.accelerator.autocast():  # which FSDP's model does not have in itself
            output = self.state.model(batch.images, batch.masks, batch.targets)
        losses = self.criterion(output, batch.targets, totals)
        self.accelerator.backward(losses["loss"])
        if self.observe is not None:
            self.observe(number, self.accelerator.unwrap_model(self.state.model), output, batch.targets)
        return {name: value.detach() for name, value in losses.items()}

    def _pass_over_groups(self, batch: Any, totals: StepTotals) -> dict[str, Tensor]:
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

    def _note_skipped_step(self, first: int, image_ids: list[list[int]], losses: Iterable[Tensor]) -> None:
        """Count and report a step, given the batches of the epoch before it, and the ids and the loss of each batch."""
        current, epoch, allowed = self.state.current, self.state.epoch + 1, self.settings.max_skipped_steps
        current.skipped += 1
        guilty = [ids for ids, loss in zip(image_ids, losses, strict=True) if not loss.isfinite()]
        what = "loss" if guilty else "gradient"
        ids = [image_id for of_batch in guilty or image_ids for image_id in of_batch]
        where = f"epoch {epoch}, batches {first + 1} to {first + len(image_ids)}"
        logger.warning("%s: the %s is not finite: step skipped; image ids %s", where, what, ids)
        if current.skipped > allowed:
            raise TrainingError(
                f"{current.skipped} steps of epoch {epoch} had a loss or a gradient that is not finite, "
                f"and {allowed} are allowed; the last on the image ids {ids}: look at these images and "
                "their boxes, or lower the learning rate"
            )

    def _note_overflow(self, overflowed: bool) -> None:
        """Count a step with a loss scaler."""
        current = self.state.current
        current.overflowed += overflowed
        current.overflows_in_a_row = current.overflows_in_a_row + 1 if overflowed else 0
        if current.overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW:
            raise TrainingError(
                f"gradients overflowed in the last {current.overflows_in_a_row} steps, though the loss scale of fp16 "
                f"fell to {self.accelerator.scaler.get_scale():g}: train with precision bf16 or no, or lower the "
                "learning rate"
            )

    def _save_where_asked(self) -> None:
        """Write a checkpoint within the epoch if it is time for one, or if the training is to stop."""
        current, every = self.state.current, self.settings.checkpoint_every
        stop = self._asked_to_stop()
        due = (
            every and (current.steps + current.skipped + current.overflowed + (self._enqueued is not None)) % every == 0
        )
        if stop or due:
            self.save()
        if stop:
            self._stop_in_epoch()

    def _stop_in_epoch(self) -> NoReturn:
        self._stop(f"in epoch {self.state.epoch + 1}")

    def stop_if_asked(self) -> None:
        """End the training if it was asked to stop; for evaluations, which come after a checkpoint.

        Every process must call this at the same time.

        Raises:
            TrainingStopped: if it was.
        """
        if self._asked_to_stop():
            self._stop(f"in the evaluation of epoch {self.state.epoch}")

    def _asked_to_stop(self) -> bool:
        received = self.stop.received
        if self.accelerator.num_processes == 1:
            return received
        return anywhere(self.accelerator, torch.tensor(received, device=self.accelerator.device))

    def _stop(self, where: str) -> NoReturn:
        self.accelerator.end_training()
        raise TrainingStopped(f"stopped as asked, {where}; a checkpoint is written, from which resuming goes on")

    def finish_epoch(self) -> None:
        """Write a checkpoint, begin the next epoch, evaluate the one that ended if it is time to, and report.

        Raises:
            TrainingStopped: after SIGTERM or Ctrl-C, once the checkpoint is written.
            CheckpointError: if the checkpoint cannot be written.
        """
        state = self.state
        self._settle()
        state.history.append(self._row_of_epoch())
        state.next_epoch()
        self.save()
        self._evaluate_last_epoch()
        self.progress.print_epoch(state.history[-1])
        if self._asked_to_stop() and state.epoch < self.config.epochs:
            self._stop(f"after epoch {state.epoch}")

    def _evaluate_last_epoch(self) -> None:
        """Evaluate the epoch that ended last, if it is time to, and add the metrics to its checkpoint.

        The checkpoint comes first, so that a fault in an evaluation costs nothing but the evaluation.
        """
        state, row = self.state, self.state.history[-1]
        if self.evaluate is None or (
            row["epoch"] % self.settings.evaluate_every != 0 and row["epoch"] < self.config.epochs
        ):
            return
        averaged = nullcontext() if state.average is None else state.average.in_model()
        with random_state_kept(), averaged:
            row["metrics"] = self.evaluate(state.model)
        self.progress.log_metrics(row)
        state.save_history(self.settings.run, self.settings.metadata)
        self._write_results()
        if best_epoch(state.history) is row:
            self._mark_best()

    def _evaluate_what_was_interrupted(self) -> None:
        """Evaluate the epoch of a resumed checkpoint, if the run ended between the two."""
        state = self.state
        if state.history and not state.current.batches and "metrics" not in state.history[-1]:
            self._evaluate_last_epoch()

    def _row_of_epoch(self) -> dict[str, Any]:
        """What the history says of the current epoch."""
        current = self.state.current
        graphs = {} if self.graphs is None else {"steps_without_graph": current.without_graph}
        return {
            "epoch": self.state.epoch + 1,
            "seconds": round(current.seconds, 2),
            "peak_memory_mib": peak_memory_mib(),
            "skipped_steps": current.skipped,
            **({} if self.accelerator.scaler is None else {"overflowed_steps": current.overflowed}),
            **graphs,
            "unreadable_images": len(self.state.unreadable()),
            "train": {name: (total / current.steps).item() for name, total in mean_losses(current.sums).items()},
        }

    def _waited_long_enough(self) -> bool:
        history, patience = self.state.history, self.settings.early_stopping
        if not patience or not history or "metrics" not in history[-1]:
            return False
        waited = epochs_without_gain(history, self.settings.early_stopping_delta)
        if waited < patience:
            return False
        self.progress.print(f"stopped early after epoch {self.state.epoch}: no better AP for {waited} epochs")
        return True

    def _mark_best(self) -> None:
        """Let ``checkpoints/best`` have the weights of the best epoch so far."""
        best = best_epoch(self.state.history)
        if best is not None and self.accelerator.is_main_process:
            mark_best(self.settings.run, best["epoch"])

    def save(self) -> None:
        """Write a checkpoint and ``results.json``.

        Raises:
            CheckpointError: if the checkpoint cannot be written.
            TrainingError: once it is written, if all processes together could not read more samples than are allowed.
        """
        self._settle()
        self.state.save(self.settings.run, self.settings.metadata, self.settings.keep_checkpoints)
        self._write_results()
        self.accelerator.wait_for_everyone()
        self._check_unreadable()

    def _check_unreadable(self) -> None:
        """The limit of a data set is for all processes; each by itself sees only when it alone exceeds it."""
        dataset = self.state.loader.dataset
        limit, count = getattr(dataset, "limit", None), len(self.state.unreadable())
        if limit is not None and count > limit:
            raise TrainingError(
                f"{count} of {len(dataset)} images cannot be read, over all processes, and {limit} are allowed: "
                "repair those that the warnings name, or allow more and resume"
            )

    def _write_results(self) -> None:
        if self.accelerator.is_main_process:
            write_whole(self.settings.run / "results.json", json.dumps(self._results(), indent=1) + "\n")

    def _results(self) -> dict[str, Any]:
        history = self.state.history
        best = best_epoch(history)
        return {
            **self.settings.metadata,
            "optimization": asdict(self.config),
            "torch": torch.__version__,
            "peak_memory_mib": max((row["peak_memory_mib"] for row in history), default=None),
            "best_epoch": best and best["epoch"],
            "epochs": history,
        }


class _EnqueuedStep(NamedTuple):
    """A step that the host has not looked at since it launched it."""

    first: int  # batches of the epoch before it
    image_ids: list[list[int]]  # of each batch
    outcome: StepOutcome
    broken: Flag
