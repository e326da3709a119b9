"""Optimiser and learning-rate schedules of the paper (section 4.1)."""

import math
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from .graphs import GraphSizes

__all__ = ["SCHEDULES", "OptimizationConfig", "build_optimizer", "build_scheduler", "described_groups", "go_on_at"]

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
        decay_norms: whether it acts on norms and embeddings too, as in DETR; in Mask2Former's repository it does not.
        clip_norm: largest norm of the gradient; 0 for no clipping.
        batch_size: images per process and batch; or "auto", for the largest number that fits into the GPU's memory with
            a margin, which is found by trying, at the largest sizes that the data can have.
        accumulate: batches per optimiser step; with ``batch_size`` "auto" it follows from ``images_per_step``.
        images_per_step: with ``batch_size`` "auto": images of an optimiser step, over all processes (the paper: 16).
        precision: "no" for float32, or the type of mixed precision; None for that of accelerate launch, or else "no".
        tf32: round the factors of float32 products to TF32 on GPUs that have it, which is several times as fast; what
            is added up stays float32.
        ema_decay: of the moving average of the weights, which is then what is evaluated and saved; 0 for none.
        groups_per_pass: groups of queries that the decoder and the loss take at a time, so that memory does not grow
            with the number of groups; 0 for all at once. The gradients are the same.
        recompute_layers: compute decoder layers again in the backward pass, which takes time and saves memory.
        compile: compile the model with torch.compile.
        cuda_graphs: launch whole optimiser steps as CUDA graphs, of at most so many sizes of images and targets; 0 to
            launch every kernel. Steps of other sizes run without a graph.
        graph_image_multiple: with ``cuda_graphs``: pad heights and widths of images to multiples of this.
        graph_targets: with ``cuda_graphs``: numbers of targets per image to pad to, rising.
        seed: of weights, data order, augmentation and dropout.
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
        for name in ("epochs", "batch_size", "accumulate", "images_per_step"):
            value = getattr(self, name)
            if name == "batch_size" and value == "auto":
                continue
            if isinstance(value, str) or value < 1:
                raise ValueError(f"{name} must be at least 1{' or auto' * (name == 'batch_size')}, got {value}")
        for name in (
            "warmup_steps",
            "lr",
            "backbone_lr",
            "query_lr",
            "weight_decay",
            "clip_norm",
            "groups_per_pass",
            "cuda_graphs",
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lr_drop is not None and not all(epoch > 0 for epoch in self.lr_drop):
            raise ValueError(f"lr_drop must hold positive epochs, got {self.lr_drop}")
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze must hold names of parts, such as ({self.freeze!r},), got {self.freeze!r}")
        object.__setattr__(self, "freeze", tuple(self.freeze))  # lists are what one writes in Python
        if not 0 < self.backbone_layer_decay <= 1:
            raise ValueError(f"backbone_layer_decay must be in (0, 1], got {self.backbone_layer_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.cuda_graphs:
            _ = self.graph_sizes  # which checks them
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or None, got {self.schedule!r}")

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
            ValueError: if it is another one than ``precision``, or none of this package.
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
        """The same settings with a precision, and with ``epochs`` and ``lr_drop`` from the named schedule if any."""
        config = replace(self, precision=self.precision or "no")
        if config.schedule is None:
            return config
        epochs, lr_drop = SCHEDULES[config.schedule]
        return replace(config, schedule=None, epochs=epochs, lr_drop=lr_drop)


def build_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with rates of their own for those of the backbone, or for each layer of it,
    and for learned queries.

    Which these are, a model's ``is_backbone`` and ``is_query`` say of their names; of a model without them, those under
    ``model.backbone``, and none.

    Raises:
        ValueError: for ``backbone_layer_decay`` with a backbone whose layers are not known, and for ``query_lr`` with a
            model that trains no learned queries.
    """
    undecayed = set() if config.decay_norms else _norms_and_embeddings(model)
    is_backbone = getattr(model, "is_backbone", lambda name: name.startswith("backbone."))
    queries = _queries(model) if config.query_lr is not None else set()
    scales = _layer_scales(model, config.backbone_layer_decay)
    chosen: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_backbone = is_backbone(name)
            scale = scales.get(parameter, 1.0) if in_backbone else 1.0
            chosen[name in queries, in_backbone, scale, name in undecayed].append(parameter)
    groups = []
    for of_queries, in_backbone, scale, is_undecayed in sorted(chosen):  # the early layers of a backbone first
        lr = config.backbone_lr * scale if in_backbone else config.lr
        if of_queries and config.query_lr is not None:
            lr = config.query_lr
        parameters = chosen[of_queries, in_backbone, scale, is_undecayed]
        groups.append({"params": parameters, "lr": lr, "weight_decay": 0.0 if is_undecayed else config.weight_decay})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _queries(model: nn.Module) -> set[str]:
    """Names of the learned queries that a model trains, of which there must be some."""
    is_query = getattr(model, "is_query", lambda name: False)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad and is_query(name)}
    if not found:
        raise ValueError(
            f"query_lr is the rate of learned queries, of which {type(model).__name__} trains none: leave it out"
        )
    return found


def _layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """What the backbone's rate is multiplied by, for each trainable parameter of it; empty without a decay."""
    if decay == 1:
        return {}
    scales: Any = next((module.layer_scales for module in model.modules() if hasattr(module, "layer_scales")), None)
    if scales is None:
        raise ValueError(
            f"backbone_layer_decay={decay:g} needs a backbone timm:NAME, whose layers timm names; "
            f"{type(model).__name__} has another one"
        )
    found: dict[nn.Parameter, float] = scales(decay)
    return found


def described_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """A line about each group of parameters that an optimiser trains: how many numbers, rate and weight decay."""
    return [
        f"{len(group['params'])} tensors of {sum(each.numel() for each in group['params']):,} numbers  "
        f"lr {group.get('initial_lr', group['lr']):.3g}  weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]


def _norms_and_embeddings(model: nn.Module) -> set[str]:
    """Names of the parameters of norm layers and embedding tables."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
    }


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimizationConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as a function of the optimiser step.

    Rates drop after epochs; ``steps_per_epoch`` says where that is. A run that goes on with epochs of another length
    goes on at the same epoch: see :func:`go_on_at`.
    """
    total = max(config.epochs * steps_per_epoch, 1)

    def factor(step: int) -> float:
        warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        if config.decay == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        return warm * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.drops)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def go_on_at(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Set the position of a schedule, in steps of its own length, and the rates of its optimiser with it."""
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
