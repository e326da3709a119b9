"""Settings of a training: how it optimises, and how its loop runs."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..field_types import take_field_types
from .graph_sizes import GraphSizes

__all__ = ["SCHEDULES", "LoopSettings", "OptimizationConfig", "TrainerSettings"]

PRECISIONS = ("bf16", "fp16")  # besides float32
LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # the variable in which accelerate launch passes it on
SCHEDULES = {"12e": (12, (11,)), "50e": (50, (40,))}  # name: (epochs, epochs after which the rates drop)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How to train.

    Attributes:
        schedule: a schedule of the paper by name, which sets ``epochs`` and ``lr_drop``; None to set them yourself.
        epochs: passes over the training images.
        lr_drop: epochs, or fractions of them, after each of which the rates drop to a tenth (``decay="step"``); None
            for one drop before the last twelfth of ``epochs``: after 11 of 12, 46 of 50, 92 of 100.
        decay: "step", or "cosine" from the peak to 0 over the whole run.
        warmup_steps: optimiser steps over which the rates rise linearly to their peak.
        lr: peak learning rate of everything but the backbone.
        backbone_lr: peak learning rate of the backbone.
        query_lr: peak learning rate of the learned queries; None for ``lr``.
        backbone_layer_decay: factor of the backbone's learning rate from each of its layers to the one before it, for
            backbones timm:NAME: the last layer has ``backbone_lr``, and earlier ones less (ViTs: 0.7 to 0.9); 1 for one
            rate.
        freeze: parts that are not trained: names of modules or parameters, with ``*`` for any text, such as backbone,
            encoder or ``*.bias``; the statistics of their batch norms stay as they are, too.
        weight_decay: of AdamW.
        decay_norms: whether weight decay acts on norms and embeddings too, as in DETR and not in Mask2Former.
        clip_norm: largest norm of the gradient; 0 or inf for no clipping.
        batch_size: images per process and batch; or "auto", for the largest number that fits into the GPU's memory with
            a margin, which is found by trying, at the largest sizes that the data can have.
        accumulate: batches per optimiser step; with ``batch_size`` "auto" it follows from ``images_per_step``.
        images_per_step: with ``batch_size`` "auto": images of an optimiser step, over all processes (the paper: 16).
        precision: "no" for float32, or the type of mixed precision; None for that of accelerate launch, or else "no".
        tf32: round the factors of float32 products to TF32 on GPUs that have it, which is several times as fast; what
            is added up stays float32.
        ema_decay: decay of a moving average of the weights, which is then evaluated and saved; 0 for no average.
        groups_per_pass: groups of queries that the decoder and the loss take at a time, so that memory does not grow
            with the number of groups; 0 for all at once. The gradients are the same.
        recompute_layers: compute decoder layers again in the backward pass, which takes time and saves memory.
        compile: compile the model with torch.compile.
        cuda_graphs: launch whole optimiser steps as CUDA graphs, of at most so many sizes of images and targets; 0 to
            launch every kernel. Steps of other sizes run without a graph.
        graph_image_multiple: with ``cuda_graphs``: pad heights and widths of images to multiples of this.
        graph_targets: with ``cuda_graphs``: numbers of targets per image to pad to, rising.
        seed: of weights, data order, augmentation and dropout.

    Raises:
        ValueError: for a value of another type or out of bounds.
    """

    schedule: Literal["12e", "50e"] | None = None
    epochs: int = 12
    lr_drop: tuple[float, ...] | None = None
    decay: Literal["step", "cosine"] = "step"
    warmup_steps: int = 0
    lr: float = 1e-4
    backbone_lr: float = 1e-5
    query_lr: float | None = None
    backbone_layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    weight_decay: float = 1e-4
    decay_norms: bool = True
    clip_norm: float = 0.1
    batch_size: int | Literal["auto"] = 2
    accumulate: int = 1
    images_per_step: int = 16
    precision: Literal["no", "bf16", "fp16"] | None = None
    tf32: bool = True
    ema_decay: float = 0.0
    groups_per_pass: int = 0
    recompute_layers: bool = False
    compile: bool = False
    cuda_graphs: int = 0
    graph_image_multiple: int = 128
    graph_targets: tuple[int, ...] = (16, 32, 64, 128)
    seed: int = 42

    def __post_init__(self) -> None:
        take_field_types(self, OptimizationConfig)
        for name in ("epochs", "batch_size", "accumulate", "images_per_step"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1{' or auto' * (name == 'batch_size')}, got {value}")
        for name in (
            "warmup_steps",
            "lr",
            "backbone_lr",
            "query_lr",
            "weight_decay",
            "groups_per_pass",
            "cuda_graphs",
            "seed",
        ):
            if not 0 <= (getattr(self, name) or 0) < math.inf:  # which also refuses what is not a number
                raise ValueError(f"{name} must not be negative and must be finite, got {getattr(self, name)}")
        if not self.clip_norm >= 0:  # which also refuses what is not a number
            raise ValueError(f"clip_norm must not be negative, got {self.clip_norm}")
        if self.lr_drop is not None and not all(epoch > 0 for epoch in self.lr_drop):
            raise ValueError(f"lr_drop must hold positive epochs, got {self.lr_drop}")
        if not 0 < self.backbone_layer_decay <= 1:
            raise ValueError(f"backbone_layer_decay must be in (0, 1], got {self.backbone_layer_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.cuda_graphs:
            _ = self.graph_sizes  # which checks them

    @property
    def drops(self) -> tuple[float, ...]:
        """``lr_drop``, or what None stands for; none in a training of one epoch."""
        if self.lr_drop is not None:
            return self.lr_drop
        before = self.epochs - max(1, round(self.epochs / 12))
        return (before,) if before else ()

    @property
    def images_per_batch(self) -> int:
        """``batch_size``, where it is a number.

        Raises:
            ValueError: if it is "auto", which a training replaces by a number first.
        """
        if self.batch_size == "auto":
            raise ValueError("batch_size auto is found when a training begins: give a number here")
        return self.batch_size

    @property
    def graph_sizes(self) -> GraphSizes:
        """Which sizes of steps have graphs; only with ``cuda_graphs``."""
        return GraphSizes(self.cuda_graphs, self.graph_image_multiple, self.graph_targets)

    def as_launched(self) -> "OptimizationConfig":
        """The same settings, with the precision of ``accelerate launch --mixed_precision`` if there is one.

        Raises:
            ValueError: if it differs from ``precision``, or is no precision of this package.
        """
        launched: Any = os.environ.get(LAUNCHED_PRECISION, "no").lower()
        if launched == "no":  # which accelerate launch says, too, where nothing was asked for
            return self
        if launched not in PRECISIONS:
            raise ValueError(f"accelerate launch asks for {launched}: train with {', '.join(PRECISIONS)} or no")
        if self.precision not in (None, launched):
            raise ValueError(
                f"precision is {self.precision} in this run and {launched} for accelerate launch "
                f"({LAUNCHED_PRECISION}): give it to one of them, or the same to both"
            )
        return replace(self, precision=launched)

    def resolved(self) -> "OptimizationConfig":
        """The same settings with a precision and ``lr_drop``, and with the epochs of the schedule if that is named."""
        config = replace(self, precision=self.precision or "no")
        if config.schedule is None:
            return replace(config, lr_drop=config.drops)
        epochs, lr_drop = SCHEDULES[config.schedule]
        return replace(config, schedule=None, epochs=epochs, lr_drop=lr_drop)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When a training evaluates, saves and ends.

    Attributes:
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        early_stopping: epochs without a better AP after which the training ends; 0 to train all of them.
        early_stopping_delta: by how much AP (0 to 1) must rise to count as better.
        checkpoint_every: optimiser steps between checkpoints within an epoch; 0 for none but at its end.
        checkpoint_minutes: minutes after which a checkpoint is written within an epoch, so that a run that is killed
            loses no more than these; 0 for none.
        keep_checkpoints: epochs whose weights are kept, the newest ones, besides the best; 0 for all. The two that
            can be resumed are kept in any case.
        max_skipped_steps: steps of an epoch that may be skipped because their loss is not finite.

    Raises:
        ValueError: for a value of another type or out of bounds.
    """

    evaluate_every: int = 1
    early_stopping: int = 0
    early_stopping_delta: float = 0.0
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        take_field_types(self, LoopSettings)
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        for name in (each.name for each in fields(LoopSettings)):
            if not getattr(self, name) >= 0:  # which also refuses what is not a number
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainerSettings(LoopSettings):
    """How a training runs, apart from what it trains.

    Attributes:
        optimization: how to train, as it is given: the trainer resolves what it leaves open.
        run: folder of the run.
        metadata: what is needed to rebuild the model, kept in every checkpoint and in ``results.json``.
        files: texts to write beside the weights of every checkpoint, by the name of the file.
        trackers: where curves go, see ``tracking.start_trackers``.
        tracked: settings by name, which trackers show.

    Raises:
        ValueError: for a value of another type or out of bounds.
    """

    optimization: OptimizationConfig
    run: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    trackers: tuple[str, ...] = ("tensorboard",)
    tracked: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        take_field_types(self, TrainerSettings)
        super().__post_init__()
