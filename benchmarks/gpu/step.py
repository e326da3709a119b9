"""Whole training steps of detectors: what groups of queries cost, and what others' parts cost in the place of ours.

A step is what training/engine.py does for a batch on one GPU in bf16: pack the targets and copy them to the device,
forward pass, loss, backward pass, clip the gradient, see that loss and gradient are finite (for which the host waits),
AdamW, schedule. The images are on the device already, where a data loader would have put them during the step before.
A step as a CUDA graph is that of training/graphs.py, whose host sees a step later whether it was finite.

Kinds of rows, each with ``model``, ``groups``, ``batch`` and ``contender``:

step     ``wall`` seconds of a step with quartiles, ``host`` until the host is free again, ``ratio`` of wall times to
         the step ``ratio_to`` in the same rounds, ``difference`` from this package's result with dropout off
memory   ``bytes`` at the peak of a step beyond ``static_bytes`` (weights and state of the optimiser), and ``ratio`` of
         ``bytes`` to those of one group
syncs    how often the host waits for the GPU in ``work``, and at which ``places`` most
kernels  ``seconds`` of a step in which the GPU works, ``gpu_busy``, their share of the time between the first and the
         last kernel, and the kernels that cost ``most``
parts    seconds of a step's parts by the GPU's clock, which goes on while the GPU waits for the host
"""

import contextlib
import itertools
import math
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from groupdetr_fast.training.graphs import WARM_UP
from harness.interleave import in_turn, quartiles

from .clock import HostTimes, host_syncs, host_times, peak_bytes, synchronize
from .recorder import Recorder, what_became
from .training_step import (
    Batch,
    Step,
    Training,
    attending_by_torch,
    cast_one_by_one,
    criterion_of,
    difference,
    folded,
    in_graph,
    in_passes,
    masked,
)

__all__ = ["run"]

CONDITIONAL, DINO = "conditional_detr_r50", "dino_4scale_r50"
GROUPS = {CONDITIONAL: (1, 11), DINO: (1, 3)}
FEW, LARGE = 2, 16  # images
SAMPLE = 0.2  # seconds of a sample at least, since a synchronisation stands at its end
ROUNDS = (3, 7)
SECONDS = 1.5  # for a step's rounds, beyond the fewest
PROFILED = 2  # steps


def time_steps(recorder: Recorder, steps: Sequence[Step]) -> dict[int, float]:
    """Check steps, then time them round by round; ratios are to the first one.

    Returns:
        Median seconds of each number of groups, of steps by the contender of the first one.
    """
    samples: dict[int, list[HostTimes]] = {}
    calls, differences = {}, {}
    for index, step in enumerate(steps):
        try:
            differences[index] = difference(step)
            step()
            once = host_times(step, step.batch.device, 1).wall
        except Exception as error:
            recorder.add("step", **step.fields, **what_became(error))
        else:
            calls[index] = 1 if recorder.rehearsal else min(max(1, math.ceil(SAMPLE / once)), 10)
            samples[index] = []
            continue
        step.forget()
    end = time.monotonic() + min(SECONDS * len(samples), recorder.seconds_left)
    fewest, most = (2, 2) if recorder.rehearsal else ROUNDS
    for number in range(most):
        if number >= fewest and time.monotonic() > end:
            break
        for index in in_turn(samples, number):
            try:
                samples[index].append(host_times(steps[index], steps[index].batch.device, calls[index]))
            except Exception as error:
                recorder.add("step", **steps[index].fields, **what_became(error))
                del samples[index]
    walls = {}
    for index, values in samples.items():
        step, base = steps[index], samples.get(0)
        row = {"rounds": len(values), "calls": calls[index], "difference": differences[index]}
        row["wall_q1"], row["wall"], row["wall_q3"] = quartiles([value.wall for value in values])
        row["host"] = statistics.median(value.host for value in values)
        if base is not None and index > 0:
            row["ratio"] = statistics.median(own.wall / of_base.wall for own, of_base in zip(values, base, strict=True))
            row["ratio_to"] = f"{steps[0].contender}, K = {steps[0].training.num_groups}"
        recorder.add("step", **step.fields, **row)
        if step.contender == steps[0].contender:
            walls[step.training.num_groups] = row["wall"]
    return walls


def measure_memory(recorder: Recorder, steps: Sequence[Step]) -> None:
    """Peaks of steps, with ratios to that of the first."""
    first = None
    for step in steps:
        with recorder.row("memory", **step.fields) as row:
            step()  # the optimiser has its state, and kernels are compiled
            row["bytes"] = peak_bytes(step, recorder.device)
            row["static_bytes"] = step.training.static_bytes
            if step is steps[0]:
                first = row["bytes"]
            elif first and row["bytes"]:
                row["ratio"] = row["bytes"] / first
        if "bytes" not in row:
            step.forget()


def count_syncs(recorder: Recorder, steps: Sequence[Step]) -> None:
    """Of the criterion alone, and of the whole step."""
    for step, work in itertools.product(steps, ("criterion", "step")):
        with recorder.row("syncs", **step.fields, work=work) as row:
            places = host_syncs(step.criterion_alone() if work == "criterion" else step, recorder.device)
            row["count"] = None if places is None else len(places)
            row["places"] = Counter(places or ()).most_common(5)


def profile_kernels(recorder: Recorder, steps: Sequence[Step], walls: Mapping[int, float]) -> None:
    """How busy the GPU is, and with what; on the CPU, operators stand for kernels.

    Args:
        walls: seconds of a step without a profiler, by the number of groups, where they are known.
    """
    for step in steps:
        with recorder.row("kernels", **step.fields) as row:
            row.update(_kernels(step))
            if step.training.num_groups in walls:
                row["gpu_busy_unprofiled"] = row["seconds"] / walls[step.training.num_groups]


def _kernels(step: Step) -> dict[str, Any]:
    on_gpu = step.batch.device.type == "cuda"
    kind, activity = (DeviceType.CUDA, ProfilerActivity.CUDA) if on_gpu else (DeviceType.CPU, ProfilerActivity.CPU)
    step()
    with profile(activities=[activity]) as profiled:
        for _ in range(PROFILED):
            step()
        synchronize(step.batch.device)
    events = [event for event in profiled.events() if event.device_type == kind and not event.is_user_annotation]
    if not events:
        raise RuntimeError("the profiler saw no kernels")
    busy, begin, end = busy_time([(event.time_range.start, event.time_range.end) for event in events])
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in events:
        times[event.name] += event.time_range.end - event.time_range.start  # microseconds
        launches[event.name] += 1
    most = [
        {"name": name[:120], "seconds": spent / PROFILED / 1e6, "launches": launches[name] / PROFILED}
        for name, spent in times.most_common(10)
    ]
    return {
        "seconds": busy / PROFILED / 1e6,
        "gpu_busy": busy / (end - begin),
        "launches": len(events) / PROFILED,
        "most": most,
    }


def busy_time(spans: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Time that lies in at least one of the spans, begin of the first and end of the last."""
    spans = sorted(spans)
    begin = end = spans[0][0]
    busy = 0.0
    for start, stop in spans:
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return busy, begin, end


class Marks:
    """Times of the ends of a step's parts, by the device's clock."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Medians over steps; each part begins where the one before it ended."""
        samples: dict[str, list[float]] = {}
        for (_, begin), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            if part != "start":
                samples.setdefault(part, []).append(begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin)
        return {part: statistics.median(values) for part, values in samples.items()}


def time_parts(recorder: Recorder, steps: Sequence[Step]) -> None:
    for step in steps:
        with recorder.row("parts", **step.fields) as row:
            row.update(_parts(step, 1 if recorder.rehearsal else 5))


def _parts(step: Step, repeats: int) -> dict[str, float]:
    step()
    marks = Marks(step.batch.device)
    marked = replace(step, mark=marks)
    with contextlib.ExitStack() as stack:
        for part in ("backbone", "encoder"):
            module = step.training.model.get_submodule(part)
            hook = module.register_forward_hook(lambda *_, part=part: marks(part))
            stack.callback(hook.remove)
        for _ in range(repeats):
            marked()
    synchronize(step.batch.device)
    return marks.seconds()


def compile_model(recorder: Recorder, step: Step) -> None:
    """First the decoder, to which most of the cost of groups belongs, then all, as the training loop compiles."""
    model = step.training.model
    backend = "aot_eager" if recorder.rehearsal else "inductor"
    parts: tuple[tuple[str, Callable[..., Any]], ...] = ()
    for part, contender in (("decode", "torch.compile of the decoder"), ("encode", "torch.compile")):
        if parts and not recorder.has_time("step", 30, **{**step.fields, "contender": contender}):
            return
        parts = (*parts, (part, torch.compile(getattr(model, part), backend=backend)))
        compiled = replace(step, contender=contender, compiled=parts)
        with recorder.row("step", **compiled.fields) as row, _within(recorder.seconds_left - 5):
            expected = step().item()
            start = time.perf_counter()
            loss = compiled().item()
            row["compile_seconds"] = time.perf_counter() - start
            # Dropout differs, as a check without it would compile all again.
            assert abs(loss - expected) <= 0.2 * abs(expected), (
                f"the loss is {loss:.4g}, without compile {expected:.4g}"
            )
            compiled()
            _compare(recorder, row, compiled, step)
        if "ratio" not in row:
            step.forget()
            return
    if recorder.has_time("step", 15, **{**step.fields, "contender": "CUDA graph, torch.compile"}):
        time_compiled_graph(recorder, compiled, step)


def time_compiled_graph(recorder: Recorder, compiled: Step, step: Step) -> None:
    """A graph of a compiled step beside a graph of the step as it is. Random numbers differ."""
    own, base = in_graph(compiled), in_graph(step)
    with recorder.row("step", **own.fields) as row, _within(recorder.seconds_left - 5):
        losses = [(base().item(), own().item()) for _ in range(2 * WARM_UP)]  # they train the same model
        expected, loss = (statistics.fmean(of_one) for of_one in zip(*losses, strict=True))
        assert abs(loss - expected) <= 0.2 * abs(expected), f"the loss is {loss:.4g}, without compile {expected:.4g}"
        _compare(recorder, row, own, base)
    attempt(recorder, "kernels", 3, (own,), partial(profile_kernels, walls={}))
    del own, base
    step.forget()


def _compare(recorder: Recorder, row: dict[str, Any], own: Step, base: Step) -> None:
    """Time two steps, one after the other in every round, into a row of the first."""
    calls, rounds = (1, 2) if recorder.rehearsal else (3, 5)
    pairs = [(host_times(own, recorder.device, calls), host_times(base, recorder.device, calls)) for _ in range(rounds)]
    row["wall_q1"], row["wall"], row["wall_q3"] = quartiles([mine.wall for mine, _ in pairs])
    row["host"] = statistics.median(mine.host for mine, _ in pairs)
    row["ratio"] = statistics.median(mine.wall / other.wall for mine, other in pairs)
    row["ratio_to"] = f"{base.contender}, K = {base.training.num_groups}"


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds, where signals can be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def build(recorder: Recorder, name: str) -> list[Training]:
    """A training for each number of groups; none if one of them fails."""
    trainings = []
    for num_groups in GROUPS[name]:
        with recorder.row("build", model=name, groups=num_groups) as row:
            start = time.perf_counter()
            trainings.append(Training(name, num_groups, recorder))
            synchronize(recorder.device)
            row["seconds"] = time.perf_counter() - start
    return trainings if len(trainings) == len(GROUPS[name]) else []


def attempt(
    recorder: Recorder, kind: str, seconds: float, steps: Sequence[Step], measurement: Callable[..., Any]
) -> Any:
    """``measurement(recorder, steps)`` if there is time for it. Whatever fails in it, the rest of the stage goes on."""
    if recorder.seconds_left < seconds:
        for step in steps:
            recorder.has_time(kind, seconds, **step.fields)
        return None
    try:
        return measurement(recorder, steps)
    except Exception as error:
        recorder.add(kind, **steps[-1].fields, **what_became(error))
        return None


def measure(recorder: Recorder, trainings: Sequence[Training], batch: Batch) -> None:
    """Everything of a detector with few images, what matters most first."""
    one, many = (Step(training, batch) for training in trainings)
    training = many.training
    contenders, passes, theirs = [masked(training, batch), folded(training, batch)], [], []
    if training.name == CONDITIONAL:
        passes = [in_passes(training, batch)]
        contenders += [attending_by_torch(training, batch), cast_one_by_one(training, batch)]
        theirs = [criterion_of(name, training, batch) for name in ("transformers", "rfdetr")]
    walls = attempt(recorder, "step", 15, (one, many), time_steps) or {}
    measure_graphs(recorder, trainings, batch)
    attempt(recorder, "memory", 5, (one, many, *passes), measure_memory)
    attempt(recorder, "step", 20, (many, *contenders, *theirs, *passes), time_steps)
    for step in (many, *theirs[:1]):
        attempt(recorder, "syncs", 3, (step,), count_syncs)
    for step in (many, one) if theirs else (many,):
        attempt(recorder, "kernels", 8, (step,), partial(profile_kernels, walls=walls))
    # Without the check, at which the host waits for the step before, one sees its own time.
    unchecked = [replace(step, contender="without the check", checked=False) for step in (one, many)]
    attempt(recorder, "step", 8, unchecked, time_steps)
    for step in (many, one):
        attempt(recorder, "parts", 3, (step,), time_parts)


def measure_graphs(recorder: Recorder, trainings: Sequence[Training], batch: Batch) -> None:
    """Steps as CUDA graphs, each beside the same step without one; then what the GPU does in them."""
    eager = [Step(training, batch) for training in trainings]
    graphed = [in_graph(step) for step in eager]
    for pair in zip(eager, graphed, strict=True):
        attempt(recorder, "step", 8, pair, time_steps)
    walls = attempt(recorder, "step", 5, graphed, time_steps) or {}
    for step in reversed(graphed):
        attempt(recorder, "kernels", 4, (step,), partial(profile_kernels, walls=walls))
    unchecked = [replace(step, contender="CUDA graph without the check", checked=False) for step in graphed]
    attempt(recorder, "step", 5, unchecked, time_steps)
    del graphed, unchecked, pair, step  # whose graphs keep the memory of a whole step
    eager[0].forget()
    if eager[-1].training.name == CONDITIONAL:
        measure_ways(recorder, eager[-1])


def measure_ways(recorder: Recorder, step: Step) -> None:
    """Steps as graphs, beside one as it is: torch attends to the images; weights are cast one by one."""
    ways = (attending_by_torch(step.training, step.batch), cast_one_by_one(step.training, step.batch))
    graphed = [in_graph(each) for each in (step, *ways)]
    attempt(recorder, "step", 8, graphed, time_steps)
    attempt(recorder, "kernels", 3, graphed[1:2], partial(profile_kernels, walls={}))
    del graphed
    step.forget()


def measure_large(recorder: Recorder, trainings: Sequence[Training], batch: Batch) -> None:
    """The same for many images, where the host matters less: times and memory."""
    one, many = (Step(training, batch) for training in trainings)
    contenders = [masked(many.training, batch), folded(many.training, batch)]
    if many.training.name == CONDITIONAL:
        contenders.append(attending_by_torch(many.training, batch))
    seconds = 10 if many.training.name == CONDITIONAL else 20
    attempt(recorder, "step", seconds, (one, many), time_steps)
    measure_graphs(recorder, trainings, batch)
    attempt(recorder, "memory", seconds / 2, (one, many), measure_memory)
    attempt(recorder, "step", seconds, (many, *contenders), time_steps)


def run(recorder: Recorder) -> None:
    """Conditional DETR, then DINO, with 2 images, then with 16; torch.compile last, as it may take all time."""
    threads = torch.get_num_threads()
    if recorder.rehearsal:
        torch.set_num_threads(1)  # more of them wait for each other in work as small as this
    try:
        _run(recorder)
    finally:
        torch.set_num_threads(threads)


def _run(recorder: Recorder) -> None:
    whole = [name for name in GROUPS if recorder.wants(name)]
    graphs = [name for name in GROUPS if name not in whole and recorder.wants(f"graph of {name}")]
    compiled = [CONDITIONAL] if recorder.wants("compile") else []
    few = Batch(FEW, recorder)
    trainings = {}
    for name in GROUPS:
        if name not in (*whole, *graphs, *compiled):
            continue
        trainings[name] = build(recorder, name)
        if trainings[name] and name in whole:
            measure(recorder, trainings[name], few)
        elif trainings[name] and name in graphs:
            measure_graphs(recorder, trainings[name], few)
    measured = [name for name in (*whole, *graphs) if trainings[name]]
    many = None
    if measured:
        with recorder.row("build", batch=LARGE):
            many = Batch(3 if recorder.rehearsal else LARGE, recorder)
    for name in measured:
        if many is not None:
            (measure_large if name in whole else measure_graphs)(recorder, trainings[name], many)
    del many
    if compiled and trainings[CONDITIONAL]:
        step = Step(trainings[CONDITIONAL][-1], few)
        attempt(
            recorder, "step", 30, (replace(step, contender="torch.compile"),), lambda *_: compile_model(recorder, step)
        )
