"""What the host does in an optimiser step beside the model: plainly, with everything looked up at every step, and here.

    OMP_NUM_THREADS=1 python benchmarks step_host [--write]

The weights of a Conditional DETR R50 with 11 groups, cut down to one number each: their modules and names are all
there, so that the host does what it does in a training, and arithmetic takes no time. Operators are those that the
dispatcher sees, each at least one kernel on a GPU; views and new memory are none. On a GPU the plain way also waits for
the device once a step, to read whether the step is to be skipped.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.device_step import DeviceStep, RunningStatistics
from groupdetr_fast.training.ema import AveragedWeights
from groupdetr_fast.training.half_weights import CAST, HalfWeights
from groupdetr_fast.training.optimization import build_optimizer
from groupdetr_fast.training.step_losses import Losses
from harness.documents import ON_CPUS, table, write_section
from harness.results import processor

__all__ = ["Operators", "parts_of_a_step", "rows"]

DECAY = 0.9997
PLAIN, HERE = "plain", "here"


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, but for those that only make another view of a tensor, or an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not (function.is_view or "empty" in function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def cut_down(model: nn.Module) -> nn.Module:
    """Let every weight and buffer be one number."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.flatten()[:1].clone()
    return model


def parts_of_a_step(model: nn.Module, losses: dict[str, Tensor]) -> dict[str, dict[str, Callable[[], Any]]]:
    """What a step does beside the model, by name, in both ways.

    Args:
        model: cut down.
        losses: of a step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    gradients = [parameter.grad for parameter in parameters]
    average, plain_average = AveragedWeights(model, DECAY), {n: t.clone() for n, t in model.state_dict().items()}
    statistics_of_norms = RunningStatistics(model)
    sums = {PLAIN: {name: torch.zeros(()) for name in losses}, HERE: Losses.of(losses)}

    cast_in = [
        (module, name, weight)
        for module in model.modules()
        if type(module) in CAST
        for name, weight in module.named_parameters(recurse=False)
        if weight.requires_grad
    ]
    trained = [weight for _, _, weight in cast_in]
    of_halves = [torch.ones_like(weight, dtype=torch.bfloat16) for weight in trained]
    half_weights = HalfWeights(model, torch.bfloat16)
    half_weights.take(module for module in model.modules() if type(module) in CAST)

    def cast_plainly() -> None:
        torch.autograd.grad([weight.to(torch.bfloat16) for weight in trained], trained, of_halves)

    def cast() -> None:
        with half_weights.cast():
            torch.autograd.grad([getattr(module, name) for module, name, _ in cast_in], trained, of_halves)

    def update_plainly() -> None:
        state = model.state_dict()
        moving = [name for name, tensor in state.items() if tensor.is_floating_point()]
        averages, weights = ([tensors[name] for name in moving] for tensors in (plain_average, state))
        moves = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(moves, 1 - DECAY)
        torch._foreach_add_(averages, moves)
        for name in state.keys() - set(moving):
            plain_average[name].copy_(state[name])

    def scan() -> list[Tensor]:
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        return [buffer for norm in norms if norm.training for buffer in norm.buffers(recurse=False)]

    def add_plainly() -> None:
        for name, value in losses.items():
            sums[PLAIN][name] = sums[PLAIN][name] + value

    def add() -> None:
        sums[HERE] = sums[HERE] + Losses.of(losses)

    parts = {
        "casts of weights to bfloat16, and of their gradients back": {PLAIN: cast_plainly, HERE: cast},
        "averaged weights": {PLAIN: update_plainly, HERE: lambda: average.update(unless=torch.tensor(False))},
        "statistics of batch norms": {PLAIN: scan, HERE: statistics_of_norms.copies},
        "sums of losses": {PLAIN: add_plainly, HERE: add},
        "norm of the gradient": {
            PLAIN: lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
            HERE: lambda: nn.utils.clip_grad_norm_(parameters, 0.1),
        },
    }
    config = OptimizationConfig()
    optimizer, plain_optimizer = build_optimizer(model, config), build_optimizer(model, config)

    def step_plainly() -> None:
        scan()
        cast_plainly()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if (losses["loss"] + norm).isfinite():
            plain_optimizer.step()
            add_plainly()
            update_plainly()
        plain_optimizer.zero_grad()
        give_back()

    def give_back() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def add_gradients(batches: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        cast()
        return [losses], nn.utils.clip_grad_norm_(parameters, 0.1)

    step = DeviceStep(add_gradients, model, optimizer, average)

    def step_here() -> None:
        sums[HERE] = sums[HERE] + step([None]).losses
        give_back()

    return {**parts, "all of them, and AdamW": {PLAIN: step_plainly, HERE: step_here}}


def cpu_milliseconds(ways: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """CPU time of a call in each way, the median of some rounds, in which they take turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for way, run in ways.items():
            begin = time.process_time()
            for _ in range(calls):
                run()
            found[way].append(1000 * (time.process_time() - begin) / calls)
    return {way: statistics.median(times) for way, times in found.items()}


def rows(rounds: int = 15, calls: int = 10) -> list[list[str]]:
    """Of each part the milliseconds and the operators of both ways."""
    model = gd.build_model("conditional_detr_r50", num_classes=91, num_groups=11, backbone_weights=None).train()
    layers = range(model.config.decoder_layers - 1)
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    names = ["loss", *kinds, *(f"{kind}_{layer}" for layer in layers for kind in kinds)]
    parts = parts_of_a_step(cut_down(model), {name: torch.rand(()) for name in names})
    found = []
    for name, ways in parts.items():
        times = cpu_milliseconds(ways, rounds, calls)
        operators = []
        for run in ways.values():
            with Operators() as counted:
                run()
            operators.append(counted.number)
        found.append([name, *(f"{times[way]:.2f}" for way in ways), *map(str, operators)])
    return found


def text() -> str:
    """What is printed."""
    header = ["part of a step", "plain, ms", "here, ms", "plain, operators", "here, operators"]
    where = f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}; milliseconds of CPU time"
    return f"{where}.\n\n{table(header, rows())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {ON_CPUS.name}")
    if parser.parse_args().write:
        write_section(ON_CPUS, "step_host", text())
    else:
        print(text())
