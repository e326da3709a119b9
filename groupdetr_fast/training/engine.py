"""The training loop, on Hugging Face Accelerate."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..files import write_whole
from ..random_state import random_state_kept
from ..targets import StepTotals
from .checkpoint import mark_best
from .config import TrainerSettings
from .device_step import DeviceStep
from .ema import AveragedWeights
from .faults import (
    StopRequest,
    TrainingError,
    TrainingStopped,
    deaths_of_processes_explained,
    deaths_of_workers_explained,
)
from .freezing import freeze
from .gradients import Observe, StepGradients, chooses
from .graphs import CapturableStep, StepGraphs, check_graphs
from .optimization import build_optimizer, build_scheduler, described_groups
from .processes import agreed, anywhere
from .progress import TrainingProgress, reset_peak_memory
from .recompute import recompute_decoder_layers
from .results import RESULTS, results_of, row_of_epoch
from .scaled_step import ScaledStep
from .selection import best_epoch, epochs_without_gain, has_ended
from .setup import build_accelerator, send_buffers_only_if_trained
from .sharding import check_sharding
from .state import TrainingState
from .step_ledger import StepLedger
from .tracking import start_trackers

__all__ = ["Trainer", "TrainerSettings", "build_accelerator"]

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model and keeps checkpoints, curves and results in the folder of the run.

    A run that was interrupted at any moment and resumed ends with the weights of one that was not: on one CPU process,
    bit for bit. For that, only optimiser steps draw from the random generators; whatever else draws from them, such as
    an evaluation, puts them back.

    :meth:`fit` is the whole training. To time or to watch steps alone, without evaluations and checkpoints::

        for batches in trainer.steps():
            losses = trainer.run_step(batches)

    Args:
        accelerator: from :func:`build_accelerator`.
        model: called as ``model(images, masks, targets)``.
        criterion: called as ``criterion(output, targets, totals)``; the result's ``"loss"`` is minimised.
        loader: yields batches with ``images``, ``masks``, ``targets`` and ``image_ids``; its sampler has ``set_epoch``,
            and what it yields depends on the epoch alone. Its data set may have ``unreadable``, the indices of samples
            that could not be read, whose number is reported; ``remember``, which takes such indices from a checkpoint;
            and ``limit``, how many there may be over all processes.
        settings: how the training runs.
        evaluate: called after an epoch with this trainer, whose model then has the weights to evaluate; returns
            metrics, of which ``"AP"`` picks the best epoch. None not to evaluate.
        observe: called as ``observe(step, model, output, targets)`` after the backward pass of every batch and before
            the weights change, with the number of the batch in the run, counted from 1, and the bare model. If it has a
            method ``wants(number)``, only for batches of which this says True. With CUDA graphs it must have one, and
            the steps of these batches are launched kernel by kernel.

    Attributes:
        state: everything that the training changes; checkpoints hold it.
        frozen: names of the parameters that the setting ``freeze`` keeps from being trained.

    Raises:
        ValueError: for settings that do not fit the model or the device.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Callable[[Any, Any, StepTotals], dict[str, Tensor]],
        loader: DataLoader[Any],
        settings: TrainerSettings,
        *,
        evaluate: Callable[["Trainer"], dict[str, Any]] | None = None,
        observe: Observe | None = None,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.config = settings.optimization.resolved()
        # It gets the trainer and must not keep it: two objects that hold each other live until the interpreter ends,
        # and so do the threads of DDP's process group, which then abort it now and then (pytorch/pytorch#179291).
        self.evaluate = evaluate
        self.sampler: Any = loader.sampler
        self.frozen = freeze(model, self.config.freeze) if self.config.freeze else []
        if self.config.recompute_layers:
            recompute_decoder_layers(model)
        if self.config.compile:
            for part in ("encode", "decode"):  # which are all of forward, and what passes over groups call
                setattr(model, part, torch.compile(getattr(model, part)))
        check_sharding(accelerator)
        if self.config.cuda_graphs:
            check_graphs(accelerator, self.config, observing=observe is not None and not chooses(observe))
        self.stop = StopRequest()
        self.state = self._build_state(model, loader)
        self.ledger = StepLedger(self.state, settings.max_skipped_steps, self.config.clip_norm)
        self.gradients = StepGradients(self.state, model, criterion, self.config, observe)
        self._step = self._build_step()
        self.graphs = self._build_graphs() if self.config.cuda_graphs else None
        self._saved = time.monotonic()
        self._norm: Tensor  # of the gradient of the last step
        self.progress = TrainingProgress(accelerator, self.state, self.config.epochs)

    def _build_state(self, bare: nn.Module, loader: DataLoader[Any]) -> TrainingState:
        """The state before the first step."""
        config, accelerator = self.config, self.accelerator
        model, optimizer, loader = accelerator.prepare(bare, build_optimizer(bare, config), loader)
        send_buffers_only_if_trained(model)
        if accelerator.process_index > 0:  # the weights are one, dropout and noise are each process's own
            set_seed(config.seed + accelerator.process_index)
        scheduler = build_scheduler(optimizer, config, steps_per_epoch=-(-len(loader) // config.accumulate))
        average = AveragedWeights(bare, config.ema_decay) if config.ema_decay else None
        return TrainingState(accelerator, model, optimizer, scheduler, average, loader, config.accumulate)

    def _build_step(self) -> DeviceStep:
        state, accelerator = self.state, self.accelerator
        agree = _Agreement(accelerator, self.stop, self._time_is_up) if accelerator.num_processes > 1 else None
        parts = (self.gradients, self.gradients.bare, state.optimizer, state.average, agree)
        return DeviceStep(*parts) if accelerator.scaler is None else ScaledStep(*parts, scaler=accelerator.scaler)

    def _build_graphs(self) -> StepGraphs:
        state = self.state
        step = CapturableStep(self.gradients, self.gradients.bare, state.optimizer, state.average)
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
                loads images or another one that trains died.
            CheckpointError: if a checkpoint cannot be written.
        """
        start_trackers(self.accelerator, self.settings.trackers, self.settings.run, self.settings.tracked)
        explained = deaths_of_workers_explained(self.state.loader.num_workers)
        with self.stop, self.progress.shown(self.config.lr), explained, deaths_of_processes_explained():
            self._say_what_is_trained()
            self._evaluate_what_was_interrupted()
            if self.state.epoch >= self.config.epochs:
                self._say_all_is_trained()
                self._write_results()  # the process may have ended between an evaluation and this
            while self.state.epoch < self.config.epochs and not self._stops_early():
                self._run_epoch()
        self.accelerator.end_training()
        return self._results()

    def has_ended(self) -> bool:
        """Whether nothing is left to train or to evaluate, which is then said. Nothing is written."""
        settings = self.settings
        rules = self.config.epochs, settings.early_stopping, settings.early_stopping_delta
        if not has_ended(self.state.history, *rules):
            return False
        if not self._stops_early():
            self._say_all_is_trained()
        return True

    def _say_all_is_trained(self) -> None:
        self.progress.display.print(
            f"nothing to train: the run has {self.state.epoch} epochs, and epochs is {self.config.epochs}; a "
            "larger number goes on"
        )

    def _say_what_is_trained(self) -> None:
        """Print the groups of the optimiser if settings change them."""
        if self.frozen:
            self.progress.display.print(f"frozen: {len(self.frozen)} tensors, by {' '.join(self.config.freeze)}")
        if self.frozen or self.config.backbone_layer_decay != 1 or self.config.query_lr is not None:
            for line in described_groups(self.state.optimizer):
                self.progress.display.print(f"trained: {line}")

    def _run_epoch(self) -> None:
        current = self.state.current
        begin = time.perf_counter() - current.seconds
        self.state.model.train()
        reset_peak_memory()
        self._saved = time.monotonic()  # an evaluation, however long, changes nothing that a checkpoint would keep
        asked = time.perf_counter()
        for batches in self._steps_until_stopped():
            waited = time.perf_counter() - asked
            losses = self.run_step(batches)
            current.seconds = time.perf_counter() - begin
            images = sum(len(batch.image_ids) for batch in batches)
            self.progress.step_ended(len(batches), losses, self._norm, images=images, waited=waited)
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
        loader: Any = self.state.loader
        done = self.state.current.batches
        if done == len(loader):
            return
        if done:
            loader = self.accelerator.skip_first_batches(loader, done)
        loader.set_epoch(self.state.epoch)
        self.sampler.set_epoch(self.state.epoch)  # Accelerate's loaders of several processes do not pass the epoch on
        batches: Iterator[Any] = iter(loader)
        with random_state_kept():  # a loader draws a seed when it starts
            first = next(batches)
        batches = itertools.chain((first,), batches)
        while step := list(itertools.islice(batches, self.config.accumulate)):
            yield step

    def endless_steps(self) -> Iterator[list[Any]]:
        """What :meth:`steps` gives, epoch after epoch, for those who look at steps alone; in training mode."""
        self.state.model.train()
        while True:
            yield from self.steps()
            self.ledger.settle()
            self.state.next_epoch()

    def run_step(self, batches: list[Any]) -> dict[str, Tensor]:
        """One optimiser step; the model must be in training mode.

        The host does not wait for the step: it sees whether the step was skipped, counts it and warns when the next
        step is enqueued, or an epoch ends or a checkpoint is written. On the device a skipped step has changed nothing
        from the beginning. With a loss scaler (fp16) the host waits.

        Returns:
            Its detached losses, of this process. Those of a skipped step are not finite, or have a gradient that is
            not.

        Raises:
            TrainingError: if too many steps had to be skipped.
        """
        outcome = None
        if self.graphs is not None and not self.gradients.observes(len(batches)):
            outcome = self.graphs.run(batches)
        if self.graphs is not None and (outcome is None or not outcome.replayed):
            self.state.current.without_graph += 1
        if outcome is None:
            outcome = self._step(batches)
        self.ledger.enqueue(batches, outcome)
        self.state.scheduler.step()
        self._norm = outcome.norm
        return outcome.losses.by_name()

    def _save_where_asked(self) -> None:
        """Write a checkpoint within the epoch if it is time for one, or if the training is to stop."""
        every = self.settings.checkpoint_every
        # Several processes go by what their steps told all of them: one that went by itself would save or stop alone.
        alone = self.accelerator.num_processes == 1
        stop = self.stop.received if alone else self.ledger.stopping
        time_is_up = self._time_is_up() if alone else self.ledger.time_is_up
        due = every and self.ledger.begun % every == 0
        if stop or due or time_is_up:
            self.save()
        if stop:
            self._stop_in_epoch()

    def _time_is_up(self) -> bool:
        """Whether the last checkpoint is as old as it may become."""
        minutes = self.settings.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self._saved >= 60 * minutes

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
        """Whether any process was asked to stop; all must call this at the same time."""
        return anywhere(self.accelerator, self.stop.received)

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
        self.ledger.settle()
        if self.graphs is not None:
            self.graphs.advise()
        state.history.append(row_of_epoch(state, graphs=self.graphs is not None))
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
            row["metrics"] = self.evaluate(self)
        self.progress.log_metrics(row)
        state.save_history(self.settings.run, self.settings.metadata)
        self._write_results()
        if best_epoch(state.history) is row:
            self._mark_best()

    def _evaluate_what_was_interrupted(self) -> None:
        """Evaluate the last epoch of a resumed run that ended between its checkpoint and its evaluation."""
        state = self.state
        if state.history and not state.current.batches and "metrics" not in state.history[-1]:
            self._evaluate_last_epoch()

    def _stops_early(self) -> bool:
        history, patience = self.state.history, self.settings.early_stopping
        if not patience or not history or "metrics" not in history[-1]:
            return False
        waited = epochs_without_gain(history, self.settings.early_stopping_delta)
        if waited < patience:
            return False
        self.progress.display.print(f"stopped early after epoch {self.state.epoch}: no better AP for {waited} epochs")
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
        self.ledger.settle()
        settings = self.settings
        self.state.save(settings.run, settings.metadata, settings.keep_checkpoints, settings.files)
        self._write_results()
        self._saved, self.ledger.time_is_up = time.monotonic(), False
        self.accelerator.wait_for_everyone()
        self._check_unreadable()

    def _check_unreadable(self) -> None:
        """Apply the limit of the data set to all processes together; the data set of each counts for itself."""
        dataset: Any = self.state.loader.dataset
        limit, count = getattr(dataset, "limit", None), len(self.state.unreadable())
        if limit is not None and count > limit:
            raise TrainingError(
                f"{count} of {len(dataset)} images cannot be read, over all processes, and {limit} are allowed: "
                "repair those that the warnings name, or allow more and resume"
            )

    def _write_results(self) -> None:
        if self.accelerator.is_main_process:
            write_whole(self.settings.run / RESULTS, json.dumps(self._results(), indent=1) + "\n")

    def _results(self) -> dict[str, Any]:
        return results_of(self.state.history, self.config, self.settings.metadata)


class _Agreement:
    """What processes tell each other in a step, in one exchange: the flags of :class:`StepOutcome`."""

    def __init__(self, accelerator: Accelerator, stop: StopRequest, time_is_up: Callable[[], bool]):
        self.accelerator = accelerator
        self.stop = stop
        self.time_is_up = time_is_up

    def __call__(self, broken: Tensor) -> Tensor:
        said = [torch.full_like(broken, each) for each in (self.stop.received, self.time_is_up())]
        return agreed(self.accelerator, torch.stack([broken, *said]))
