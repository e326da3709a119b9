"""What an eager call of an op costs the host, without a GPU.

    OMP_NUM_THREADS=1 python benchmarks op_host [--write]

Sizes are as small as they can be, so that arithmetic takes no time. Ops whose GPU kernels are in Triton run these, on
tensors of the CPU: compiled as for a GPU, and launched by Triton's own launcher for a driver that does nothing
(harness/no_device.py). Deformable attention and the assignment run their C++ kernels for the CPU, which the host calls
as it does those of CUDA; these allocate more, and launch. "By the dispatcher" is what ``torch.library`` and Triton make
of the same ops: autograd by its kernels in Python, and every kernel launched by ``kernel[grid]``.
"""

import argparse
import csv
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast import _eager, _gpus, _library, ops
from groupdetr_fast.losses import GroupMatcher, SetCriterion
from harness.commits import commit
from harness.documents import ON_CPUS, significant, table, write_section
from harness.interleave import in_turn
from harness.no_device import idle_driver
from harness.places import RESULTS
from harness.results import processor

__all__ = ["HERE", "PARTS", "PLAIN", "Call", "calls", "on_idle_gpu", "plainly", "rows", "yardsticks"]

HERE, PLAIN = "here", "by the dispatcher"
PARTS = ("checks", "to the kernel", "arguments", "allocation", "launch", "autograd")


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        name: of the op.
        run: the public function, on inputs that require a gradient if it has one.
        inputs: what the gradient is for; none: it has none.
        op, op_backward: the op below the public function, and its backward op: name and arguments.
    """

    name: str
    run: Callable[[], Any]
    inputs: tuple[Tensor, ...] = ()
    op: tuple[str, tuple[Any, ...]] | None = None
    op_backward: tuple[str, tuple[Any, ...]] | None = None

    def forward(self) -> Any:
        return self.run()

    def both(self) -> Any:
        out = self.run()
        return torch.autograd.grad(out, self.inputs, torch.ones_like(out))


def calls() -> list[Call]:
    """One of every op, and of the criterion at 6 layers, 2 images, 11 groups."""
    made = [attention_call(), cross_attention_call(), deformable_call(), class_loss_call()]
    logits, boxes, targets = torch.randn(1, 1, 1, 1), torch.rand(1, 1, 1, 4) / 2 + 0.2, packed(1, 1)
    made.append(Call("matching_cost", functools.partial(ops.matching_cost, logits, boxes, targets)))
    cost, one = torch.rand(1, 1, 1), torch.ones(1, dtype=torch.int64)
    made.append(Call("linear_assignment", functools.partial(ops.linear_assignment, cost, one)))
    return [*made, criterion_call()]


def attention_call() -> Call:
    groups = gd.QueryGroups(11, 1)
    query, key, value = inputs = tuple(torch.randn(1, 11, 1, 16).bfloat16().requires_grad_() for _ in range(3))
    settings = groups.as_ints(), 0.0, None, 0.25
    plain = tuple(tensor.detach() for tensor in inputs)
    out = plain[0].clone()
    backward = (out, *plain, out, torch.zeros(1, 1, 11), *settings)
    run = functools.partial(ops.grouped_attention, query, key, value, groups)
    name = "grouped_attention"
    return Call(name, run, inputs, (name, (*plain, *settings)), (f"{name}_backward", backward))


def cross_attention_call() -> Call:
    """Of queries enough to be cut into chunks for the gradients of keys and values, as those of a training are."""
    query = torch.randn(1, 513, 1, 16).bfloat16().requires_grad_()
    key, value = (torch.randn(1, 2, 1, 16).bfloat16().requires_grad_() for _ in range(2))
    padding, settings = torch.tensor([[False, True]]), (0.0, None, 0.25)
    inputs = query, key, value
    plain = tuple(tensor.detach() for tensor in inputs)
    out = plain[0].clone()
    backward = (out, *plain, padding, out, torch.zeros(1, 1, 513), *settings)
    run = functools.partial(ops.cross_attention, *inputs, padding)
    name = "cross_attention"
    return Call(name, run, inputs, (name, (*plain, padding, *settings)), (f"{name}_backward", backward))


def deformable_call() -> Call:
    shapes = ((2, 1, 1, 1), (2, 1, 1, 1, 1, 2), (2, 1, 1, 1, 1))
    inputs = value, locations, weights = tuple(torch.rand(shape).requires_grad_() for shape in shapes)
    plain = tuple(tensor.detach() for tensor in inputs)
    arguments = plain[0], [1, 1], *plain[1:]
    run = functools.partial(ops.ms_deform_attn, value, [(1, 1)], locations, weights)
    name = "ms_deform_attn"
    return Call(name, run, inputs, (name, arguments), (f"{name}_backward", (torch.ones(2, 1, 1), *arguments, False)))


def class_loss_call() -> Call:
    logits, classes = torch.randn(1, 1, 1, 1).requires_grad_(), torch.zeros(1, 1, 1, dtype=torch.int64)
    arguments = logits.detach(), classes, 0.25, 2.0
    run = functools.partial(ops.sigmoid_focal_loss, logits, classes)
    name = "sigmoid_focal_loss"
    return Call(name, run, (logits,), (name, arguments), (f"{name}_backward", (torch.ones(1, 1), *arguments)))


@dataclass
class Predictions:
    logits: Tensor
    boxes: Tensor
    groups: gd.QueryGroups


def criterion_call() -> Call:
    layers, images, groups = 6, 2, gd.QueryGroups(11, 2)
    logits = torch.randn(layers, images, groups.length, 2).requires_grad_()
    boxes = (torch.rand(layers, images, groups.length, 4) / 4 + 0.3).requires_grad_()
    criterion, targets = SetCriterion(GroupMatcher()), packed(images, 1)
    predictions = Predictions(logits, boxes, groups)
    return Call("criterion", lambda: criterion(predictions, targets)["loss"], (logits, boxes))


def packed(images: int, objects: int) -> gd.PackedTargets:
    labels, boxes = torch.zeros(objects, dtype=torch.int64), torch.rand(objects, 4) / 4 + 0.3
    return gd.PackedTargets.from_list([{"labels": labels, "boxes": boxes}] * images)


def yardsticks() -> list[Call]:
    """Torch's own, at as small sizes."""
    query, key, value = inputs = tuple(torch.randn(1, 1, 11, 16).requires_grad_() for _ in range(3))
    number = torch.randn(1).requires_grad_()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return torch.empty_like(tensors[0])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(torch.empty_like, ctx.saved_tensors))

    return [
        Call("torch's scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(*inputs), inputs),
        Call("an autograd.Function of 3 tensors that does nothing", lambda: Nothing.apply(query, key, value), inputs),
        Call("torch.exp", number.exp, (number,)),
    ]


@contextmanager
def on_idle_gpu() -> Iterator[None]:
    """Inside, tensors of the CPU take the way of those of a GPU, to Triton's kernels, which do nothing."""
    kernels = {name: kernel for (name, on_gpu), kernel in _library._python_kernels.items() if on_gpu}
    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    with ExitStack() as stack:
        stack.enter_context(idle_driver())
        stack.enter_context(mock.patch("torch.cuda.current_device", index_of_a_cpu))
        stack.enter_context(mock.patch.object(_gpus, "why_not_triton", served))
        of_cpu = {(name, False): kernel for name, kernel in kernels.items()}
        stack.enter_context(mock.patch.dict(_library._python_kernels, of_cpu))
        stack.callback(library._destroy)
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
        yield


def index_of_a_cpu() -> None:
    """In place of that of the current GPU; a function, since calls of a Mock take longer than a launch."""
    return


def served(index: int | None) -> None:
    """In place of the reason why a GPU cannot run Triton's kernels."""
    return


def never(tensors: tuple[Tensor, ...]) -> bool:
    return False


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, ops go through the dispatcher, and Triton launches kernels."""
    from groupdetr_fast.ops import _triton_launch

    with (
        mock.patch.object(_eager, "meets_only_autograd", never),
        mock.patch.object(_triton_launch, "DIRECT", False),
    ):
        yield


class Allocations(TorchDispatchMode):
    """Notes shape and dtype of the tensors that are allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "empty" in function.name():
            self.found.append((result.shape, result.dtype))
        return result


def stages_of(call: Call) -> dict[str, Callable[[], Any]]:
    """What the parts of a call follow from: its forward and backward op, and what their kernels do, each alone."""
    from groupdetr_fast.ops._triton_launch import Launch

    stages = {}
    for direction, named in (("forward", call.op), ("backward", call.op_backward)):
        name, arguments = named
        op, kernel = _eager.EagerOp(name), _library.python_kernel(name, arguments[0])
        stages[f"{direction} op"] = functools.partial(op, *arguments)
        stages[f"{direction} kernel"] = functools.partial(op._run, *arguments)
        if kernel is None:
            continue
        launches, launch = [], Launch.__call__

        def noted(self: Launch, *tensors: Any, launches: list = launches, launch: Callable = launch) -> None:
            launches.append(functools.partial(launch, self, *tensors))
            launch(self, *tensors)

        with mock.patch.object(Launch, "__call__", noted), Allocations() as allocated:
            kernel(*arguments)
        stages[f"{direction} allocation"] = functools.partial(allocate, allocated.found)
        stages[f"{direction} launch"] = functools.partial(run_all, launches)
    return stages


def allocate(sizes: list[tuple[torch.Size, torch.dtype]]) -> None:
    for shape, dtype in sizes:
        torch.empty(shape, dtype=dtype)


def run_all(functions: list[Callable[[], Any]]) -> None:
    for function in functions:
        function()


def parts_of(call: Call, times: dict[str, float]) -> dict[str, float]:
    """The parts of forward and backward together, of the times of its stages."""
    total = {what: times[f"forward {what}"] + times[f"backward {what}"] for what in ("op", "kernel")}
    parts = {"checks": times["no_grad"] - times["forward op"], "to the kernel": total["op"] - total["kernel"]}
    if "forward launch" in times:
        for what in ("allocation", "launch"):
            total[what] = times[f"forward {what}"] + times[f"backward {what}"]
        parts["arguments"] = total["kernel"] - total["allocation"] - total["launch"]
        parts |= {what: total[what] for what in ("allocation", "launch")}
    else:
        parts["arguments"] = total["kernel"]
    parts["autograd"] = times["both"] - times["no_grad"] - times["backward op"]
    return parts


Timed = tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]  # inside which context, and what


def timed_of(call: Call) -> dict[tuple[str, str, str], Timed]:
    """What is timed of a call, by its name, the way and the part of it."""
    timed: dict[tuple[str, str, str], Timed] = {}
    for way, context in ((HERE, nullcontext), (PLAIN, plainly)):
        timed[call.name, way, "forward"] = context, call.forward
        if call.inputs:
            timed[call.name, way, "both"] = context, call.both
    if call.op is not None:
        with torch.no_grad():
            stages = {"no_grad": call.run} | stages_of(call)
        timed |= {(call.name, HERE, stage): (torch.no_grad, run) for stage, run in stages.items()}
    return timed


def least(timed: dict[Any, Timed], rounds: int, sample: float) -> dict[Any, float]:
    """Microseconds of CPU time of a call: the least of some rounds, in each of which everything has its turn.

    What else the machine does only adds to such short times, and moves their medians.

    Args:
        timed: what to time.
        rounds: at least 1.
        sample: seconds that the calls of one turn take at least.
    """
    found = dict.fromkeys(timed, math.inf)
    repeats = {}
    for key, (context, run) in timed.items():
        with context():
            _sample(run, 2)  # compiles
            repeats[key] = max(1, math.ceil(sample / max(_sample(run, 5), 1e-7)))
    for turn in range(rounds):
        for key in in_turn(timed, turn):
            context, run = timed[key]
            with context():
                found[key] = min(found[key], 1e6 * _sample(run, repeats[key]))
        gc.collect()
    return found


def _sample(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, after some that find the caches full of the work before."""
    gc.disable()
    try:
        for _ in range(5):
            run()
        begin = time.thread_time()
        for _ in range(repeats):
            run()
        return (time.thread_time() - begin) / repeats
    finally:
        gc.enable()


def rows(rounds: int = 151, sample: float = 0.001) -> list[dict[str, Any]]:
    """A row for every op in both ways, and for every yardstick."""
    ours, others = calls(), yardsticks()
    timed: dict[tuple[str, str, str], Timed] = {}
    with on_idle_gpu():
        for call in ours:
            timed |= timed_of(call)
        for call in others:
            timed |= {key: value for key, value in timed_of(call).items() if key[1] == HERE}
        times = least(timed, rounds, sample)
    where = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    found = []
    for call in (*ours, *others):
        for way in (HERE, PLAIN):
            own = {stage: value for (name, of, stage), value in times.items() if (name, of) == (call.name, way)}
            if own:
                named = {name: own[name] for name in ("forward", "both") if name in own}
                parts = parts_of(call, own) if "no_grad" in own else {}
                found.append({"op": call.name, "way": way, **named, **parts, **where})
    return found


def text(found: list[dict[str, Any]]) -> str:
    """Both tables."""

    def shown(row: dict[str, Any], name: str) -> str:
        return significant(max(row[name], 0.0)) if name in row else "-"

    plain = {row["op"]: row for row in found if row["way"] == PLAIN}
    header = ["call", "forward, µs", "forward and backward, µs", f"{PLAIN}: forward", "forward and backward"]
    times, parts = [], []
    for row in found:
        if row["way"] != PLAIN:
            other = plain.get(row["op"], {})
            times.append([row["op"], *(shown(of, name) for of in (row, other) for name in ("forward", "both"))])
        if "autograd" in row:
            parts.append([row["op"], *(shown(row, part) for part in PARTS)])
    first = found[0]
    host = f"{first['cpu']}, {first['threads']} thread, torch {first['torch']}"
    tables = f"{table(header, times)}\n\n{table(['of it, µs', *PARTS], parts)}"
    return f"{host}; microseconds of CPU time, the least of many rounds.\n\n{tables}"


def write(found: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in found for column in row))
    with (RESULTS / "op_host.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()} for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the rows, and put the tables into {ON_CPUS.name}")
    parser.add_argument("--rounds", type=int, default=151, help="of which the least time is taken")
    arguments = parser.parse_args()
    found = rows(arguments.rounds)
    if arguments.write:
        write(found)
        write_section(ON_CPUS, "op_host", text(found))
    print(text(found))
