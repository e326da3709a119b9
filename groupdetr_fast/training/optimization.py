"""Optimiser and learning-rate schedules of the paper (section 4.1)."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from .config import OptimizationConfig

__all__ = ["build_optimizer", "build_scheduler", "described_groups", "go_on_at"]


def build_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with rates of their own for those of the backbone, or for each layer of it,
    and for learned queries.

    A model's ``is_backbone`` and ``is_query`` tell these parameters by their names. In a model without the two, the
    backbone is what lies under ``model.backbone``, and it has no learned queries.

    Another optimiser in its place must leave out a step on the device where its ``found_inf`` is 1, as the fused ones
    of torch do (see :class:`~groupdetr_fast.training.device_step.DeviceStep`), and for CUDA graphs be capturable.

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
