"""Is everything right? Every operator against its reference in every precision, dropout, determinism, CUDA graphs.

Kernels take seconds each to compile, so every family of operators has a process of its own for each precision. A fault
that ends a process's use of the device then costs that process's rows alone.
"""

import contextlib
import functools
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import groupdetr_fast as gd
from groupdetr_fast.layers import attention as layers_attention
from groupdetr_fast.ops._dropout import keep_mask
from groupdetr_fast.testing import error_and_bound, negative_scores
from harness import cases
from harness.interleave import in_one_line

from . import operators
from .clock import capture, count_host_syncs, interleaved
from .operators import OPS, Operator, float32_products, largest_difference, name_of
from .recorder import Recorder

# "tf32": float32, whose products of matrices torch may round to TF32.
PRECISIONS = ("bfloat16", "float32", "float16", "tf32")
TF32_EPS = 2.0**-10
# Of the largest value: what another order of additions may change.
ORDER = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 1e-4, "tf32": 1e-4}
FAMILIES = [(precision, name) for precision in PRECISIONS for name in ("attention", "cross", "deformable", "matching")]
MULTIPLYING = ("attention", "cross")  # families that multiply matrices
ATTENTION = [
    (cases.Attention(11, 300, batch=1), 0.0),
    (cases.Attention(3, 900, batch=1, denoising_groups=2, denoising_queries=100), 0.1),
    (cases.Attention(2, 65, heads=3, channels=24, denoising_groups=3, denoising_queries=20), 0.1),
    (cases.Attention(3, 100, heads=2, channels=64), 0.0),
    (cases.Attention(2, 300, heads=2, channels=128), 0.1),
    (cases.Attention(3, 2, channels=1), 0.0),
]
# A rehearsal takes the first two: without dropout, torch's kernel for half types on CPUs is less precise than is asked.
CROSS = [
    (cases.CrossAttention(3300, batch=2, heads=2), 0.1),
    (cases.CrossAttention(900, mask="none", batch=1, heads=2), 0.1),
    (cases.CrossAttention(65, heads=3, channels=32, map=(7, 9)), 0.0),
    (cases.CrossAttention(300, heads=2, channels=128, value_channels=100), 0.1),
]
DEFORMABLE = [
    replace(case, batch=batch)
    for case, batch in ((cases.GPU_DEFORMABLE[0], 1), (cases.GPU_DEFORMABLE[2], 1), (cases.Deformable(33), 3))
]
MATCHING = [cases.Matching(20), cases.Matching(100), cases.Matching(1, batch=1, num_groups=1, num_queries=7, classes=3)]


def run(recorder: Recorder) -> None:
    case = tiny(MATCHING[0]) if recorder.rehearsal else MATCHING[0]
    parts: dict[str, Callable[[], None]] = {
        "ceilings": lambda: ceilings(recorder),
        "operators": lambda: operators_in_every_precision(recorder),
        "dropout_masks": lambda: dropout_masks(recorder),
        "negative_scores": lambda: very_negative_scores(recorder),
        "criterion": lambda: criterion(recorder, case),
    }
    clocks(recorder)
    for name, part in parts.items():
        if recorder.wants(name):
            part()
    clocks(recorder)


def operators_in_every_precision(recorder: Recorder) -> None:
    families = [family for family in FAMILIES if family[0] != "tf32" or family[1] in MULTIPLYING]
    if recorder.rehearsal:
        for precision, name in families:
            check_family(recorder, precision, name)
    else:
        in_processes(recorder, families)


def in_processes(recorder: Recorder, families: Sequence[tuple[str, str]]) -> None:
    """:func:`check_family` of all, at the same time."""
    context = multiprocessing.get_context("spawn")
    processes = {}
    for family in families:
        processes[family] = context.Process(target=exit_with_the_outcome, args=(recorder, *family))
        processes[family].start()
    for (precision, name), process in processes.items():
        process.join(timeout=max(recorder.seconds_left, 1))
        if process.is_alive():
            process.kill()
            recorder.add("family", status="missing", family=name, precision=precision, note="no time: it was ended")
        elif process.exitcode == WRONG:
            recorder.mark_wrong()
        elif process.exitcode != 0:
            note = f"its process ended with exit status {process.exitcode}"
            recorder.add("family", status="wrong", family=name, precision=precision, note=note)


WRONG = 3  # exit status of a process that wrote a wrong row


def exit_with_the_outcome(recorder: Recorder, precision: str, name: str) -> None:
    check_family(recorder, precision, name)
    sys.exit(WRONG if recorder.found_wrong else 0)


def check_family(recorder: Recorder, precision: str, name: str) -> None:
    """Check all operators of a family: attention, cross, deformable or matching."""
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    with float32_products("high" if precision == "tf32" else "highest"):
        for make in makers(recorder, name, dtype):
            try:
                for operator in make():
                    check(recorder, operator, precision)
            except Exception as error:  # an operator failed to make the inputs of its backward pass
                recorder.add("family", status="wrong", family=name, precision=precision, note=in_one_line(error))


def makers(recorder: Recorder, family: str, dtype: torch.dtype) -> list[Callable[[], Iterator[Operator]]]:
    """A function for each case of a family."""
    device, rehearsal = recorder.device, recorder.rehearsal
    if family == "attention":
        chosen = [(tiny(case), p) for case, p in ATTENTION[:2]] if rehearsal else ATTENTION
        return [functools.partial(operators.attention, case, device, dtype, p) for case, p in chosen]
    if family == "cross":
        chosen = [(case.small(), p) for case, p in CROSS[:2]] if rehearsal else CROSS
        return [functools.partial(operators.cross_attention, case, device, dtype, p) for case, p in chosen]
    if family == "deformable":
        chosen = [case.small() for case in DEFORMABLE] if rehearsal else DEFORMABLE
        return [functools.partial(operators.deformable, case, device, dtype) for case in chosen]
    chosen = [tiny(MATCHING[0])] if rehearsal else MATCHING
    return [functools.partial(operators.matching, case, device, dtype) for case in chosen]


def tiny(case: cases.Attention | cases.Matching) -> cases.Attention | cases.Matching:
    if isinstance(case, cases.Matching):
        return replace(case, targets=3, num_queries=8, num_groups=2)
    return replace(case.small(), num_queries=5, heads=2)


def clocks(recorder: Recorder) -> None:
    """The card's state as it is found."""
    wanted = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,clocks_event_reasons.active"
    with recorder.row("clocks") as row:
        try:
            command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"nvidia-smi: {error}") from error
        row.update(zip(wanted.split(","), map(str.strip, printed.split(",")), strict=False))


def ceilings(recorder: Recorder) -> None:
    """What the card can do at most: bytes read and written by a copy, operations of a product of matrices."""
    device = recorder.device
    size, side = (1 << 18, 64) if recorder.rehearsal else (1 << 30, 8192)
    with recorder.row("ceiling", of="copy", unit="bytes/s") as row:
        source = torch.randn(size, device=device)
        target = torch.empty_like(source)
        # By a kernel: a copy would become a copy of the graph's own, which reaches two thirds of that.
        copy = functools.partial(torch.neg, source, out=target)
        row["value"] = 2 * source.nbytes / seconds_of(copy, device)
        del source, target, copy
    for dtype in (torch.bfloat16, torch.float32):
        with recorder.row("ceiling", of=f"product, {name_of(dtype)}", unit="operations/s") as row:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            row["value"] = 2 * side**3 / seconds_of(functools.partial(torch.matmul, a, b), device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    _, median, _ = interleaved({"only": capture([run], device)}, device, rounds=7)["only"]
    return median


def check(recorder: Recorder, operator: Operator, precision: str) -> None:
    """Errors over what the tests allow, by result; whether a second run and a CUDA graph give the same."""
    fields = {"operator": operator.name, "case": operator.case, "precision": precision}
    if not recorder.has_time("operator", 3, **fields):
        return
    with recorder.row("operator", **fields) as row, wrong_if_it_fails():
        eps = TF32_EPS if precision == "tf32" else None
        results = as_list(operator.run(*operator.inputs))
        row["error_over_allowed"] = {
            name: ratio(*error_and_bound(result, reference_of(operator, index), *operator.inputs, eps=eps))
            for index, (name, result) in enumerate(zip(operator.results, results, strict=True))
        }
        again = as_list(operator.run(*operator.inputs))
        row["same_again"] = all(map(torch.equal, again, results))
        captured = capture([lambda: as_list(operator.run(*operator.inputs))], recorder.device)
        for tensor in captured.replay():
            tensor.zero_()
        in_graph = captured.replay()
        row["same_in_graph"] = all(map(torch.equal, in_graph, results))
        row["difference_in_graph"] = largest_difference(in_graph, results)
        assert max(row["error_over_allowed"].values()) <= 1, f"errors over allowed: {row['error_over_allowed']}"
        if not operator.in_any_order:
            assert row["same_again"], "a second run gives another result"
            assert row["same_in_graph"], "a CUDA graph gives another result"
        assert row["difference_in_graph"] <= ORDER[precision], "a CUDA graph gives another result"


@contextlib.contextmanager
def wrong_if_it_fails() -> Iterator[None]:
    """An operator that raises is wrong, unless the memory is too small for its reference."""
    try:
        yield
    except (AssertionError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def reference_of(operator: Operator, index: int) -> Callable[..., Tensor]:
    return lambda *inputs: as_list(operator.reference(*inputs))[index]


def ratio(error: float, allowed: float) -> float:
    return error / allowed if allowed > 0 else float(error > 0) * 1e9


def dropout_masks(recorder: Recorder) -> None:
    """Which probabilities a kernel drops, told from its results, against the CPU's arithmetic, one by one."""
    groups = gd.QueryGroups(2, 64)
    batch, heads, length = 2, 3, groups.length
    rows = torch.arange(length)
    own = rows // groups.queries_per_group * groups.queries_per_group  # of each row, the first key of its group
    columns = own[:, None] + torch.arange(groups.queries_per_group)
    head = torch.arange(batch * heads).view(batch, heads, 1, 1)
    for bits in (0, 1, (1 << 62) + 12345, -(1 << 40) - 7):
        for p in (0.1, 0.5):
            with recorder.row("dropout mask", seed=bits, p=p) as row, wrong_if_it_fails():
                seed = torch.tensor([bits])
                expected = keep_mask(seed, p, head, rows[:, None], columns)  # [B, H, L, N]
                zeros = torch.zeros(batch, length, heads, 16, device=recorder.device)
                # Each key's value is a channel of its own, so that a result's channels are the probabilities.
                value = torch.eye(groups.queries_per_group, device=recorder.device).repeat(groups.num_groups, 1)
                value = value[None, :, None].expand(batch, length, heads, -1)
                arguments = (groups.as_ints(), p, seed.to(recorder.device), 1.0)
                out, _ = OPS.grouped_attention(zeros, zeros, value, *arguments)
                kept = (out > 0).movedim(2, 1).cpu()  # [B, H, L, N]
                row["probabilities"] = kept.numel()
                row["different"] = int((kept != expected).sum())
                assert row["different"] == 0, f"{row['different']} of {kept.numel()} probabilities differ"


def very_negative_scores(recorder: Recorder) -> None:
    """Count gradients that are not finite, of attention to 64 keys under a mask, if all scores are about -120.

    Those of cuDNN's kernel are not, which torch chooses on an H200; those of the layers must be.
    """
    padding = torch.zeros(1, 64, dtype=torch.bool, device=recorder.device)

    def heads_first(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *heads: attention(*(each.transpose(1, 2) for each in heads), ~padding[:, None, None], 0.0)

    ways: dict[str, Callable[..., Tensor]] = {
        "torch": heads_first(F.scaled_dot_product_attention),
        "attend_under_mask": heads_first(layers_attention.attend_under_mask),
        "attend": lambda *heads: layers_attention.attend(*heads, padding, 0.0),
    }
    for name, way in ways.items():
        heads = negative_scores(64, torch.bfloat16, recorder.device)
        with recorder.row("negative_scores", way=name) as row:
            grads = torch.autograd.grad(way(*heads).float().square().sum(), heads)
            row["not_finite"] = sum(int((~grad.isfinite()).sum()) for grad in grads)
            assert name == "torch" or row["not_finite"] == 0


def criterion(recorder: Recorder, case: cases.Matching) -> None:
    """The criterion's forward and backward pass: the same from a CUDA graph, and without a host synchronisation."""
    device = recorder.device
    out, targets = operators.make_predictions(case, device, torch.float32)
    on_host = [{name: tensor.cpu() for name, tensor in target.items()} for target in targets]
    packed = gd.PackedTargets.from_list(targets)
    loss = gd.build_criterion("conditional_detr_r50")
    leaves = [out.logits.requires_grad_(), out.boxes.requires_grad_()]

    def step() -> list[Tensor]:
        losses = loss(out, packed)
        return [losses["loss"].detach(), *torch.autograd.grad(losses["loss"], leaves)]

    with recorder.row("criterion", of="CUDA graph", case=str(case)) as row, wrong_if_it_fails():
        expected = step()
        captured = capture([step], device)
        for tensor in captured.replay():
            tensor.zero_()
        row["difference"] = largest_difference(captured.replay(), expected)
        assert row["difference"] < 1e-5, "a CUDA graph gives another result"
    works: dict[str, Callable[[], Any]] = {
        "forward and backward": step,
        "packing targets of the device": lambda: gd.PackedTargets.from_list(targets),
        "packing targets of the host": lambda: gd.PackedTargets.from_list(on_host).to(device, non_blocking=True),
    }
    for name, work in works.items():
        with recorder.row("host synchronisations", of=name, case=str(case)) as row:
            row["count"] = count_host_syncs(work, device)


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
