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
Ways = dict[str, Callable[[], Any]]


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


def casts(model: nn.Module) -> Ways:
    """Casts of weights to bfloat16, and of their gradients back."""
    layers = [module for module in model.modules() if type(module) in CAST]
    places = [(layer, name) for layer in layers for name, weight in layer.named_parameters() if weight.requires_grad]
    weights = [getattr(layer, name) for layer, name in places]
    gradients = [torch.ones_like(weight, dtype=torch.bfloat16) for weight in weights]
    half_weights = HalfWeights(model, torch.bfloat16)
    half_weights.take(layers)

    def plainly() -> None:
        torch.autograd.grad([weight.to(torch.bfloat16) for weight in weights], weights, gradients)

    def here() -> None:
        with half_weights.cast():
            torch.autograd.grad([getattr(layer, name) for layer, name in places], weights, gradients)

    return {PLAIN: plainly, HERE: here}


def averaged_weights(model: nn.Module) -> Ways:
    average, plain_average = AveragedWeights(model, DECAY), {n: t.clone() for n, t in model.state_dict().items()}

    def plainly() -> None:
        state = model.state_dict()
        moving = [name for name, tensor in state.items() if tensor.is_floating_point()]
        averages, weights = ([tensors[name] for name in moving] for tensors in (plain_average, state))
        moves = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(moves, 1 - DECAY)
        torch._foreach_add_(averages, moves)
        for name in state.keys() - set(moving):
            plain_average[name].copy_(state[name])

    return {PLAIN: plainly, HERE: lambda: average.update(unless=torch.tensor(False))}


def statistics_of_norms(model: nn.Module) -> Ways:
    def plainly() -> list[Tensor]:
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        return [buffer for norm in norms if norm.training for buffer in norm.buffers(recurse=False)]

    return {PLAIN: plainly, HERE: RunningStatistics(model).copies}


def sums_of_losses(losses: dict[str, Tensor]) -> Ways:
    plain_sums, sums = {name: torch.zeros(()) for name in losses}, [Losses.of(losses)]

    def plainly() -> None:
        for name, value in losses.items():
            plain_sums[name] = plain_sums[name] + value

    def here() -> None:
        sums[0] = sums[0] + Losses.of(losses)

    return {PLAIN: plainly, HERE: here}


def norm_of_the_gradient(model: nn.Module) -> Ways:
    parameters = trained(model)
    return {
        PLAIN: lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        HERE: lambda: nn.utils.clip_grad_norm_(parameters, 0.1),
    }


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parts_of_a_step(model: nn.Module, losses: dict[str, Tensor]) -> dict[str, Ways]:
    """What a step does beside the model, by name, in both ways.

    Args:
        model: cut down; its parameters get gradients.
        losses: of a step.
    """
    for parameter in trained(model):
        parameter.grad = torch.full_like(parameter, 1e-3)
    parts = {
        "casts of weights to bfloat16, and of their gradients back": casts(model),
        "averaged weights": averaged_weights(model),
        "statistics of batch norms": statistics_of_norms(model),
        "sums of losses": sums_of_losses(losses),
        "norm of the gradient": norm_of_the_gradient(model),
    }
    return {**parts, "all of them, and AdamW": whole_steps(model, losses, *parts.values())}


def whole_steps(
    model: nn.Module, losses: dict[str, Tensor], cast: Ways, average: Ways, norms: Ways, add: Ways, clip: Ways
) -> Ways:
    """Steps that are made of all parts; here the loop's own class puts them together."""
    optimizer, plain_optimizer = (build_optimizer(model, OptimizationConfig()) for _ in range(2))
    gradients = [(parameter, parameter.grad) for parameter in trained(model)]
    sums = [Losses.of(losses)]

    def give_back() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def plainly() -> None:
        norms[PLAIN]()
        cast[PLAIN]()
        norm = clip[PLAIN]()
        if (losses["loss"] + norm).isfinite():
            plain_optimizer.step()
            add[PLAIN]()
            average[PLAIN]()
        plain_optimizer.zero_grad()
        give_back()

    def add_gradients(_: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        cast[HERE]()
        return [losses], clip[HERE]()

    step = DeviceStep(add_gradients, model, optimizer, AveragedWeights(model, DECAY))

    def here() -> None:
        sums[0] = sums[0] + step([None]).losses
        give_back()

    return {PLAIN: plainly, HERE: here}


def cpu_milliseconds(ways: Ways, rounds: int, calls: int) -> dict[str, float]:
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
