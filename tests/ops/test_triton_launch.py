"""What _triton_launch launches is what Triton would: judged by Triton itself, whose compiler and driver are fakes.

The fake compiler compiles nothing, but keeps what it was asked for: types, constants and alignment. The fake driver
has devices and streams, and launches nothing.
"""

import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.compiler
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops import _triton_launch
from groupdetr_fast.ops._triton_launch import Launch
from groupdetr_fast.ops.cross_attention import triton_launch as crossing
from groupdetr_fast.ops.grouped_attention import triton_launch as attention
from groupdetr_fast.ops.matching_cost import triton_kernels as matching
from groupdetr_fast.ops.sigmoid_focal_loss import triton_kernels as focal

DEVICES = itertools.count(1000)  # a new one for each test, since Triton keeps what it compiled for a device


@triton.jit(do_not_specialize=["length"])
def _kernel(out, x, y, stride, length, factor, BLOCK: triton.language.constexpr, MODE: triton.language.constexpr):
    pass


class Recorder:
    """A driver and a compiler; ``launches`` are what was launched, and with which specialisation."""

    def __init__(self):
        self.device, self.stream = next(DEVICES), 7
        self.launches = []
        self.compilations = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        assert device == self.device
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def compile(self, source, target, options):
        self.compilations += 1
        constants = {source.fn.arg_names[index]: value for (index,), value in source.constants.items()}
        compiled = mock.Mock(spec=["function", "packed_metadata", "launch_metadata", "run"])
        compiled.function = (source.fn.__name__, self.device, source.signature, constants, source.attrs)
        compiled.packed_metadata = (options["num_warps"], options["num_stages"])
        compiled.launch_metadata = lambda *_: None
        compiled.run = self.launch
        return compiled

    def launch(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        for hook in (enter, leave):
            if hook is not None:
                hook(launch_metadata)
        own = tuple(None if isinstance(value, torch.Tensor) else value for value in arguments)
        shapes = tuple(value.shape for value in arguments if isinstance(value, torch.Tensor))
        self.launches.append(((x, y, z), stream, function, metadata, own, shapes))


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(triton.compiler, "compile", made.compile)
    forget()
    yield made
    forget()


def forget():
    attention_launches = attention._forward_launch, attention._backward_launches
    crossing_launches = crossing._forward_launches, crossing._backward_launches
    others = matching._launch, focal._forward_launch, focal._backward_launch
    for function in (*attention_launches, *crossing_launches, *others):
        function.cache_clear()


def not_by_triton(*_, **__):
    raise AssertionError("Triton was to launch a kernel that it has compiled")


def unaligned(tensor):
    """The same numbers, one element behind an address that is aligned."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved.copy_(tensor)


X = torch.zeros(64)
SETTINGS = {"BLOCK": 32, "MODE": "this", "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
CASES = {
    "aligned": ((X, X, X), (16, 16, 0.5), {}),
    "unaligned": ((X, unaligned(X), X), (16, 16, 0.5), {}),
    "another unaligned": ((unaligned(X), X, X), (16, 16, 0.5), {}),
    "a stride of 1": ((X, X, X), (1, 16, 0.5), {}),
    "odd": ((X, X, X), (17, 1, 0.5), {}),
    "beyond 32 bits": ((X, X, X), (2**40, 2**33, 0.5), {}),
    "none": ((X, X, None), (16, 16, 0.5), {}),
    "half": ((X, X.half(), X), (16, 16, 0.5), {}),
    "empty": ((X, X[:0], X), (16, 16, 0.5), {}),
    "constants": ((X, X, X), (16, 16, 0.5), {"BLOCK": 64, "MODE": "other", "num_warps": 8}),
    "again aligned": ((X, X, X), (16, 16, 0.5), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_launches_what_triton_would(recorder, monkeypatch, case):
    tensors, numbers, changed = CASES[case]
    settings = SETTINGS | changed
    _kernel[(5,)](*tensors, *numbers, **settings)
    launch = Launch(_kernel, 5, numbers, settings)
    launch(*tensors)  # looks up what is compiled
    monkeypatch.setattr(JITFunction, "run", not_by_triton)
    launch(*tensors)
    expected, first, second = recorder.launches
    assert first == second == expected
    assert recorder.compilations == 1


@pytest.mark.parametrize("grid", [(5,), (5, 3), (5, 3, 2)])
def test_grids_of_several_dimensions(recorder, grid):
    tensors, numbers, settings = (X, X, X), (16, 3, 0.5), SETTINGS
    _kernel[grid](*tensors, *numbers, **settings)
    launch = Launch(_kernel, grid, numbers, settings)
    launch(*tensors)
    launch(*tensors)
    expected, first, second = recorder.launches
    assert first == second == expected


def test_one_launch_takes_tensors_of_every_kind(recorder):
    """In any order, and each time as Triton does."""
    numbers, settings = (16, 3, 0.5), SETTINGS
    launch = Launch(_kernel, 5, numbers, settings)
    kinds = [tensors for tensors, *_ in CASES.values()]
    for tensors in [*kinds, *kinds[::-1], *kinds]:
        recorder.launches.clear()
        launch(*tensors)
        _kernel[(5,)](*tensors, *numbers, **settings)
        ours, expected = recorder.launches
        assert ours == expected
    functions = {str(found.function) for found in launch._compiled.values()}
    assert len(functions) == recorder.compilations == 5  # aligned, two that are not, none, half


def test_devices_and_streams(recorder):
    settings = SETTINGS
    launch = Launch(_kernel, 5, (16, 3, 0.5), settings)
    first, other = recorder.device, next(DEVICES)
    for device, stream in ((first, 1), (other, 2), (first, 3), (other, 4)):
        recorder.device, recorder.stream = device, stream
        launch(X, X, X)
    assert [(found[1], found[2][1]) for found in recorder.launches] == [(1, first), (2, other), (3, first), (4, other)]
    assert recorder.compilations == 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches_are_called(recorder, hook):
    launch = Launch(_kernel, 5, (16, 3, 0.5), SETTINGS)
    launch(X, X, X)
    seen = []
    getattr(knobs.runtime, hook).add(seen.append)
    try:
        launch(X, X, X)
        launch(X, X, X)
    finally:
        getattr(knobs.runtime, hook).remove(seen.append)
    launch(X, X, X)
    assert len(seen) == 2
    assert len(recorder.launches) == 4


def test_hooks_of_kernels_are_called(recorder):
    launch = Launch(_kernel, 5, (16, 3, 0.5), SETTINGS)
    launch(X, X, X)
    seen = []
    _kernel.add_pre_run_hook(lambda *args, **_: seen.append(args))
    try:
        launch(X, X, X)
    finally:
        _kernel.pre_run_hooks.clear()
    assert len(seen) == 1


def test_debugging_compiles_again(recorder, monkeypatch):
    launch = Launch(_kernel, 5, (16, 3, 0.5), SETTINGS)
    launch(X, X, X)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    launch(X, X, X)
    assert recorder.compilations == 2


def test_unknown_versions_of_triton_launch_themselves(recorder, monkeypatch):
    monkeypatch.setattr(_triton_launch, "DIRECT", False)
    launch = Launch(_kernel, 5, (16, 3, 0.5), SETTINGS)
    with mock.patch.object(JITFunction, "run", autospec=True) as run:
        launch(X, X, X)
        launch(X, X, X)
    assert run.call_count == 2


def test_sums_are_fused_into_products_whatever_triton_does_by_default(recorder):
    """Triton 3.10 will not do so unless it is told."""
    settings = {name: value for name, value in SETTINGS.items() if name != "enable_fp_fusion"}
    launch = Launch(_kernel, 5, (16, 3, 0.5), settings)
    with mock.patch.object(JITFunction, "run", autospec=True) as run:
        launch(X, X, X)
    assert run.call_args.kwargs["enable_fp_fusion"] is True


def test_this_version_of_triton_is_known():
    assert triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")) is _triton_launch.DIRECT is True


def attention_calls(groups, dropout_p, dtype=torch.float16, place=lambda tensor: tensor, dim=16):
    query, key, value = (place(torch.randn(2, groups.length, 2, dim, dtype=dtype)) for _ in range(3))
    seed = torch.tensor([3]) if dropout_p else None
    settings = groups.as_ints(), dropout_p, seed, 0.25
    out, lse = attention.forward(query, key, value, *settings)
    attention.backward(out, query, key, value, out, lse, *settings)


def crossing_calls(queries, dropout_p, padded=True, place=lambda tensor: tensor):
    query = place(torch.randn(2, queries, 2, 16, dtype=torch.float16))
    key, value = (place(torch.randn(2, 9, 2, dim, dtype=torch.float16)) for dim in (16, 8))
    padding = torch.arange(9).expand(2, 9) > 6 if padded else None
    settings = dropout_p, torch.tensor([3]) if dropout_p else None, 0.25
    out, lse = crossing.forward(query, key, value, padding, *settings)
    crossing.backward(out, query, key, value, padding, out, lse, *settings)


def by_head(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def loss_calls(shape, place=lambda tensor: tensor, dtype=torch.float32, gamma=2.0):
    logits = place(torch.randn(shape, dtype=dtype))
    classes = torch.zeros(shape[:-1], dtype=torch.int64)
    loss = focal.forward(logits, classes, 0.25, gamma)
    focal.backward(loss, logits, classes, 0.25, gamma)


def cost_calls(targets, place=lambda tensor: tensor):
    logits, boxes = place(torch.randn(3, 2, 5, 4)), place(torch.rand(3, 2, 5, 4))
    labels, target_boxes = torch.zeros(2, targets, dtype=torch.int64), torch.rand(2, targets, 4)
    matching.forward(logits, boxes, labels, target_boxes, torch.tensor([targets, 0]), 2.0, 5.0, 2.0, 0.25, 2.0)


OPS = {
    "attention": lambda: attention_calls(QueryGroups(3, 40), 0.0),
    "attention with dropout": lambda: attention_calls(QueryGroups(3, 40), 0.25),
    "attention with denoising": lambda: attention_calls(QueryGroups(3, 40, 2, 5), 0.1),
    "attention of unaligned tensors": lambda: attention_calls(QueryGroups(3, 7), 0.0, place=unaligned),
    "attention of transposed tensors": lambda: attention_calls(QueryGroups(3, 7), 0.0, place=by_head),
    "attention of one channel": lambda: attention_calls(QueryGroups(2, 3), 0.0, torch.float32, dim=1),
    "attention to images": lambda: crossing_calls(40, 0.1),
    "attention to images in chunks": lambda: crossing_calls(1100, 0.0),
    "attention to images without padding": lambda: crossing_calls(40, 0.0, padded=False),
    "attention to images, unaligned": lambda: crossing_calls(7, 0.0, place=unaligned),
    "attention to images, transposed": lambda: crossing_calls(7, 0.0, place=by_head),
    "loss": lambda: loss_calls((3, 2, 5, 91)),
    "loss of one class": lambda: loss_calls((3, 2, 5, 1)),
    "loss of a half type": lambda: loss_calls((3, 2, 5, 16), dtype=torch.bfloat16, gamma=1.5),
    "loss of unaligned logits": lambda: loss_calls((2, 5, 16), place=unaligned),
    "loss of transposed logits": lambda: loss_calls((3, 2, 5, 16), place=lambda tensor: by_head(tensor.mT).mT),
    "loss of one image": lambda: loss_calls((5, 16)),
    "cost": lambda: cost_calls(20),
    "cost of one target": lambda: cost_calls(1),
    "cost of unaligned tensors": lambda: cost_calls(3, place=unaligned),
    "cost of transposed tensors": lambda: cost_calls(3, place=by_head),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_launch_what_triton_would(recorder, monkeypatch, name):
    run = OPS[name]
    monkeypatch.setattr(_triton_launch, "DIRECT", False)
    run()
    expected = recorder.launches[:]
    recorder.launches.clear()
    monkeypatch.setattr(_triton_launch, "DIRECT", True)
    run()
    assert recorder.launches == expected
    recorder.launches.clear()
    monkeypatch.setattr(JITFunction, "run", not_by_triton)
    run()
    assert recorder.launches == expected
    assert len(expected) >= 1


def test_sizes_that_change_change_the_launch(recorder):
    for queries in (40, 80, 40):
        attention_calls(QueryGroups(3, queries), 0.0)
    grids = [launch[0] for launch in recorder.launches]
    assert grids[:3] == grids[6:]
    assert grids[:3] != grids[3:6]


@pytest.mark.parametrize(("queries", "padded", "launches"), [(40, True, 5), (40, False, 3), (1100, True, 6)])
def test_attention_to_images_takes_few_launches(recorder, queries, padded, launches):
    """Lists of keys in both passes, and sums of chunks where there are some, beside the three kernels of attention."""
    crossing_calls(queries, 0.1, padded)
    assert len(recorder.launches) == launches


def test_no_kernel_of_triton_is_imported_on_a_cpu():
    """Triton itself may be: torchvision imports it."""
    program = """
import sys
import torch
import groupdetr_fast as gd

query = torch.randn(1, 4, 1, 8, requires_grad=True)
gd.ops.grouped_attention(query, query, query, 2, dropout_p=0.5).sum().backward()
logits = torch.randn(1, 1, 4, 3, requires_grad=True)
gd.ops.sigmoid_focal_loss(logits, torch.zeros(1, 1, 4, dtype=torch.int64)).sum().backward()
targets = gd.PackedTargets.from_list([{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4) / 2}])
gd.ops.matching_cost(logits.detach(), torch.rand(1, 1, 4, 4), targets)
assert not [name for name in sys.modules if name.startswith("groupdetr_fast.ops") and "triton_" in name]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
