"""The state of a training: what a checkpoint holds, and what resuming sets again."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..random_state import random_state, restore_random_state
from .checkpoint import (
    CheckpointError,
    amend_checkpoint,
    latest_checkpoint,
    read_checkpoint,
    resumable_checkpoints,
    save_checkpoint,
)
from .ema import AveragedWeights
from .optimization import go_on_at
from .processes import mean_losses
from .sharding import gathered, sharded_like, sharded_optimizer_state
from .step_losses import Losses

__all__ = ["EpochState", "TrainingState"]

logger = logging.getLogger(__name__)

NAMED = 3  # tensors in a message


@dataclass
class EpochState:
    """How far an epoch has come.

    Attributes:
        batches: that have ended, of this process.
        steps: optimiser steps that were taken.
        skipped: optimiser steps that were not, since the loss or the gradient was not finite.
        overflowed: optimiser steps that the loss scaler of fp16 left out, since a scaled gradient was too large.
        overflows_in_a_row: steps that the loss scaler left out since the last one that was taken.
        without_graph: optimiser steps, of both kinds, that were launched kernel by kernel though CUDA graphs are used.
        seconds: spent so far.
        sums: losses summed over the steps that were taken.
        norms: norms of their gradients before clipping, summed too.
        clipped: steps that were taken with a clipped gradient.
    """

    batches: int = 0
    steps: int = 0
    skipped: int = 0
    overflowed: int = 0
    overflows_in_a_row: int = 0
    without_graph: int = 0
    seconds: float = 0.0
    sums: Losses = field(default_factory=Losses)
    norms: float = 0.0
    clipped: int = 0


@dataclass
class TrainingState:
    """Everything that a training changes.

    Attributes:
        accelerator: of the training; a checkpoint has its loss scale, and the random states of all its processes.
        model, optimizer, loader: as the accelerator prepared them. The loader's data set may have ``unreadable`` and
            ``remember``; see :class:`~groupdetr_fast.training.engine.Trainer`.
        scheduler: of the optimiser, one step per optimiser step.
        average: moving average of the weights, if one is kept.
        accumulate: batches per optimiser step.
        epoch: number of epochs that have ended.
        current: the epoch after those.
        history: a row for each epoch that has ended, in types that json has.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    average: AveragedWeights | None
    loader: DataLoader[Any]
    accumulate: int = 1
    epoch: int = 0
    current: EpochState = field(default_factory=EpochState)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def batches(self) -> int:
        """Batches of the whole run that have ended, of this process."""
        return self.epoch * self.batches_per_epoch + self.current.batches

    def next_epoch(self) -> None:
        """Count the current epoch as ended, and begin the one after it."""
        begun = EpochState(overflows_in_a_row=self.current.overflows_in_a_row)
        self.epoch, self.current = self.epoch + 1, begun

    def unreadable(self) -> list[int]:
        """Indices of the samples that could not be read so far, each once, however many processes met it."""
        return sorted(set(gather_object(list(getattr(self.loader.dataset, "unreadable", [])))))

    def save(self, run: Path, metadata: dict[str, Any], keep: int = 0, files: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint into the folder of a run. Every process must call this; the main one writes.

        Args:
            run: the folder.
            metadata: what is needed to rebuild the model.
            keep: epochs whose weights stay; 0 for all.
            files: texts to write beside the weights, by the name of the file.

        Raises:
            CheckpointError: if it cannot be written.
        """
        main = self.accelerator.is_main_process
        random_states = gather_object([random_state()])
        sums = mean_losses(self.current.sums)
        unreadable = self.unreadable()
        weights = gathered(self.accelerator.unwrap_model(self.model).state_dict(), keep=main)
        optimizer = gathered(self.optimizer.state_dict(), keep=main)
        average = None if self.average is None else gathered(self.average.average, keep=main)
        self.accelerator.wait_for_everyone()
        if not main:
            return
        scaler = self.accelerator.scaler
        state = {
            "epoch": self.epoch,
            "current": {**vars(self.current), "sums": sums},
            "batches_per_epoch": self.batches_per_epoch,
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random_states,
            "unreadable": unreadable,
            "history": json.dumps(self.history),
        }
        if self.average is not None:
            # The averaged weights are those to evaluate; the trained ones are then part of the state.
            state |= {"weights": weights, "ema_updates": self.average.updates.item()}
            weights = average
        description = self._description(metadata)
        save_checkpoint(run, self.epoch, self.current.batches, weights, state, description, keep, files)

    def save_history(self, run: Path, metadata: dict[str, Any]) -> None:
        """Write the history into the checkpoint of the epoch that has just ended. The main process alone writes.

        Raises:
            CheckpointError: if it cannot be written.
        """
        if self.accelerator.is_main_process:
            newest = latest_checkpoint(run)
            assert newest is not None  # the one of this epoch
            amend_checkpoint(newest, self._description(metadata), history=json.dumps(self.history))

    def resume(self, run: Path) -> Path | None:
        """Restore the newest checkpoint of a run that can be used. Returns its folder; None if the run has none.

        Raises:
            CheckpointError: if there are checkpoints, and none of them can be used.
        """
        folders = resumable_checkpoints(run)
        for index, folder in enumerate(folders):
            try:
                self.restore(folder)
            except CheckpointError as error:
                if index == len(folders) - 1:
                    raise
                logger.warning("%s; going back to the one before it", error)
            else:
                return folder
        return None

    def restore(self, folder: Path) -> None:
        """Set everything that :meth:`save` wrote.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or is of another model or training.
        """
        weights, state = read_checkpoint(folder)
        try:
            self._take_over(weights, state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {folder} does not belong to this training: {reason}") from None

    def _take_over(self, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        current = self._epoch_of(state)
        # Where weights are averaged, the checkpoint's own are the averages, and the trained ones are part of the state.
        trained = state.get("weights", weights)
        model = self.accelerator.unwrap_model(self.model)
        own = model.state_dict()
        _check_weights(trained, own)
        model.load_state_dict(sharded_like(trained, own))
        if self.average is not None:
            self.average.restart(sharded_like(weights, own), state.get("ema_updates", 0))
        configured = [{**group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(sharded_optimizer_state(state["optimizer"], self.optimizer))
        # Rates and the like are those of the settings of this run, not those of the checkpoint.
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        random_states, process = state["random"], self.accelerator.process_index
        if process < len(random_states):
            restore_random_state(random_states[process])
        if state.get("unreadable") and (remember := getattr(self.loader.dataset, "remember", None)):
            remember(state["unreadable"])
        self.history = json.loads(state["history"])
        self.epoch, self.current = state["epoch"], current
        go_on_at(self.scheduler, self.epoch * self.steps_per_epoch + -(-current.batches // self.accumulate))

    def _epoch_of(self, state: dict[str, Any]) -> EpochState:
        """How far the epoch of a checkpoint's state has come."""
        sums = Losses.of(state["current"]["sums"])
        current = EpochState(**{**state["current"], "sums": sums})
        if current.batches and state["batches_per_epoch"] != self.batches_per_epoch:
            raise ValueError(
                f"it was written within an epoch of {state['batches_per_epoch']} batches, and now an epoch has "
                f"{self.batches_per_epoch}: use the same data, batch_size and number of processes"
            )
        current.sums = Losses(sums.names, sums.values.to(self.accelerator.device))
        return current

    def _description(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The metadata, with what the weights have been through: finished epochs, and AP if these are evaluated."""
        last = self.history[-1] if self.history and not self.current.batches else {}
        return {**metadata, "epoch": self.epoch, "AP": last.get("metrics", {}).get("AP")}


def _check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse the weights of another model in one sentence; torch's own message would fill a page."""
    differences = [f"{name} is not in it" for name in own if name not in saved]
    differences += [f"it has {name}" for name in saved if name not in own]
    for name in own.keys() & saved.keys():
        if own[name].shape != saved[name].shape:
            differences.append(f"{name} has shape {list(saved[name].shape)} in it and {list(own[name].shape)} here")
    if differences:
        shown = ", ".join(sorted(differences)[:NAMED]) + (", ..." if len(differences) > NAMED else "")
        raise ValueError(
            f"its model differs in {len(differences)} tensors ({shown}): resume with the settings that the run was "
            "begun with"
        )
