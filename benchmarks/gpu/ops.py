"""Times of every op against its peers: on the GPU alone by CUDA graphs, and as called from Python."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness import cases
from harness.results import OURS

from . import works
from .clock import Captured, Pool, capture, eager_times, interleaved
from .operators import float32_products, largest_difference
from .recorder import Recorder, what_became
from .works import Contender, Work

# Largest difference between contenders, of the largest value: their sums have different orders, and peers may keep
# weights in lower precision.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}
ROUNDS = 7
SETS = 12  # at most: inputs of a graph, so that none is in the second cache when it is read
SECONDS = 0.03  # of one sample, a graph or calls one after another


def run(recorder: Recorder) -> None:
    for seconds, make in planned(recorder):
        name, arguments = make.func.__name__, " ".join(map(str, make.args))
        if not recorder.wants(f"{name} {arguments}"):
            continue
        if recorder.has_time("time", seconds, work=name, arguments=arguments):
            with recorder.row("work", of=name) as row:
                start = time.monotonic()
                measure(recorder, make())
                row["seconds"] = time.monotonic() - start
            if recorder.device.type == "cuda":
                torch.cuda.empty_cache()


def planned(recorder: Recorder) -> Iterator[tuple[float, Callable[[], Work]]]:
    """Works and the seconds that they take at most, the most telling first."""
    device, bf16, f32 = recorder.device, torch.bfloat16, torch.float32
    attention, deformable, matching = cases.GPU_ATTENTION, cases.GPU_DEFORMABLE, cases.GPU_MATCHING
    crossing = cases.GPU_CROSS_ATTENTION
    if recorder.rehearsal:
        attention, deformable = ([case.small() for case in every] for every in (attention, deformable))
        crossing = [case.small() for case in crossing]
        matching = [replace(case, layers=2, num_groups=2, num_queries=8, targets=3, classes=5) for case in matching]
    conditional, wide, denoising = attention
    batches = cases.GPU_BATCHES[:1] if recorder.rehearsal else cases.GPU_BATCHES
    for batch in batches:
        sized = functools.partial(replace, batch=batch)
        yield 8, functools.partial(works.attention, sized(conditional), device, bf16)
        if batch == batches[0]:
            yield 40, functools.partial(works.compiled, sized(conditional), device, bf16)
        for case in crossing[:1]:
            for dropout in (0.0, 0.1):
                yield 6, functools.partial(works.cross_attention, sized(case), device, bf16, dropout)
        yield 10, functools.partial(works.deformable, sized(deformable[0]), device, bf16)
        yield 6, functools.partial(works.assignment, sized(matching[0]), device)
        yield 8, functools.partial(works.criterion, sized(matching[0]), device)
        yield 8, functools.partial(works.attention, sized(conditional), device, bf16, 0.1)
        for case in deformable[1:]:
            yield 6, functools.partial(works.deformable, sized(case), device, bf16)
        yield 6, functools.partial(works.attention, sized(denoising), device, bf16)
        yield 4, functools.partial(works.matching_cost, sized(matching[0]), device, f32)
        yield 4, functools.partial(works.class_loss, sized(matching[0]), device, f32)
        yield 6, functools.partial(works.attention, sized(wide), device, bf16)
        for case in crossing[1:]:
            yield 6, functools.partial(works.cross_attention, sized(case), device, bf16)
        for case in matching[1:]:
            yield 6, functools.partial(works.assignment, sized(case), device)
    for batch in batches:
        sized = functools.partial(replace, batch=batch)
        yield 6, functools.partial(works.attention, sized(conditional), device, f32)
        yield 6, functools.partial(works.cross_attention, sized(crossing[0]), device, f32)
        yield 6, functools.partial(works.deformable, sized(deformable[0]), device, f32)
        yield 6, functools.partial(works.attention, sized(denoising), device, bf16, 0.1)
        yield 6, functools.partial(works.attention, sized(wide), device, bf16, 0.1)
    yield 40, functools.partial(works.compiled, sized(conditional), device, bf16)


def measure(recorder: Recorder, work: Work) -> None:
    """Check that the contenders agree with this package, then time them, and write a row for each and for each pass.

    A contender whose result is another one is not timed; one whose gradients are others is timed in its forward pass.
    """
    device = recorder.device
    rounds, seconds = (1, 0.0) if recorder.rehearsal else (ROUNDS, SECONDS)
    sets = input_sets(work.inputs, device)
    runs, expected, gradients = {}, None, None
    for name, contender in work.contenders.items():
        row = {"work": work.name, **work.fields, "contender": name}
        with recorder.row("agreement", **row) as found:
            with float32_products("highest"), torch.no_grad():
                run = contender.make()
                result = run(*sets[0])
            if work.outcome is not None:
                outcome = work.outcome(result)
                expected = expected or outcome
                found["difference"] = largest_difference(outcome, expected)
                assert found["difference"] <= AGREEMENT[work.fields["dtype"]], f"differs by {found['difference']:.2g}"
            runs[name] = passes_of(work, run)
        if "both" in runs.get(name, ()) and gradients_must_agree(work, name):
            both = runs[name].pop("both")
            with recorder.row("agreement", **row, **{"pass": "both"}) as found:
                found_gradients = gradients_of(both, sets[0])
                gradients = gradients or found_gradients
                found["difference"] = largest_difference(found_gradients, gradients)
                assert found["difference"] <= AGREEMENT[work.fields["dtype"]], f"differs by {found['difference']:.2g}"
                runs[name]["both"] = both
    graphs, notes = capture_all(work.contenders, runs, sets, seconds, device)
    gpu = interleaved(graphs, device, rounds)
    for name, passes in runs.items():
        for kind, call in passes.items():
            row = {"work": work.name, **work.fields, "contender": name, "pass": kind, "sets": len(sets)}
            with recorder.row("time", **row) as found:
                for state in ("warm", "cold"):
                    if (name, kind, state) in gpu:
                        found[f"gpu_{state}"] = gpu[name, kind, state]
                if (name, kind) in notes:
                    found["graph"] = notes[name, kind]
                once = functools.partial(call, sets[0])
                calls = calls_within(seconds, once, device, most=20)
                found.update(eager_times(once, device, calls=calls, rounds=min(rounds, 3))._asdict())


def gradients_must_agree(work: Work, name: str) -> bool:
    """Whether they can: where results are random, this package's own ways draw the same from the same seed."""
    return name.split(",")[0] == OURS or (work.peer_gradients and work.outcome is not None)


def gradients_of(both: Callable[[tuple], Any], inputs: tuple) -> list[Tensor]:
    torch.manual_seed(0)
    with float32_products("highest"):
        return list(both(inputs))


def input_sets(inputs: tuple, device: torch.device) -> list[tuple]:
    """The inputs and copies of them: so many that they do not fit the second cache, if :data:`SETS` are enough."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    number = min(max(2, math.ceil(2 * cache / max(size, 1))), SETS)
    return [inputs, *(tuple(copied(tensor) for tensor in inputs) for _ in range(number - 1))]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def passes_of(work: Work, run: Callable[..., Any]) -> dict[str, Callable[[tuple], Any]]:
    """What is timed of a contender: ``"forward"``, and ``"both"`` with the backward pass, as functions of inputs."""

    def forward(inputs: tuple) -> Any:
        return run(*inputs)

    def both(inputs: tuple) -> Any:
        out = work.result(run(*inputs))
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return {"forward": forward} | ({"both": both} if any(tensor.requires_grad for tensor in work.inputs) else {})


def capture_all(
    contenders: dict[str, Contender],
    runs: dict[str, dict[str, Callable[[tuple], Any]]],
    sets: list[tuple],
    seconds: float,
    device: torch.device,
) -> tuple[dict[tuple[str, str, str], Captured], dict[tuple[str, str], str]]:
    """Graphs by contender, pass and state of the cache; the reasons where there is none."""
    graphs, notes, pool = {}, {}, Pool(device)
    for name, passes in runs.items():
        for kind, call in passes.items():
            if not contenders[name].in_graph:
                notes[name, kind] = "it waits for the device"
                continue
            try:
                number = calls_within(seconds, functools.partial(call, sets[0]), device, most=len(sets))
                states = {"warm": [sets[0]] * number, "cold": sets[:number] if number > 1 else sets[:1]}
                for state, inputs in states.items():
                    calls = [functools.partial(call, each) for each in inputs]
                    graphs[name, kind, state] = capture(calls, device, pool)
            except Exception as error:  # whatever a peer raises
                notes[name, kind] = what_became(error)["note"]
    return graphs, notes


def calls_within(seconds: float, call: Callable[[], Any], device: torch.device, most: int) -> int:
    """How many calls take about so long, at least one."""
    call()
    once = eager_times(call, device, calls=1, rounds=1).wall
    return max(1, min(most, int(seconds / max(once, 1e-9))))
