"""The Triton kernels of grouped_attention: their tiles, and how they do on a GPU.

The numbers are tested without one in interpreted_grouped_attention.py, and test_grouped_attention.py runs on a GPU too.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from interpreted_grouped_attention import (
    LAYOUTS,
    channels_outermost,
    check,
    in_a_packed_projection,
    make_inputs,
    sequence_first,
    settings,
    surrounded_by_nan,
)

from groupdetr_fast import QueryGroups, _choices
from groupdetr_fast.ops import _triton
from groupdetr_fast.ops.grouped_attention import one_block, triton_cases, triton_launch
from groupdetr_fast.testing import attention_one_block

OP = torch.ops.groupdetr_fast.grouped_attention
OP_BACKWARD = torch.ops.groupdetr_fast.grouped_attention_backward
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def tf32_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def tiles_of_all_sizes():
    for kernel in triton_launch._TILES:
        for dtype in DTYPES:
            for dims in ((1, 128), (16, 8), (24, 32), (33, 1), (128, 100)):
                for queries in (1, 300):
                    yield triton_launch._tile(kernel, triton_launch.precision_of(dtype, *dims), *dims, queries)


def test_every_size_has_a_tile():
    assert {tile.block for tile in tiles_of_all_sizes()} == {16, 32, 64}


def test_every_size_has_a_tile_with_tf32(tf32_allowed):
    assert triton_launch.precision_of(torch.float32, 128, 128) == "tf32"
    assert {tile.block for tile in tiles_of_all_sizes()} == {16, 32, 64}


def test_every_size_has_a_tile_without_tensor_cores():
    for kernel in triton_launch._TILES:
        for dtype in DTYPES:
            for dims in ((1, 64), (16, 8), (33, 1), (32, 32)):
                precision = triton_launch.precision_of(dtype, *dims, tensor_cores=False)
                for queries in (1, 300):
                    assert triton_launch._tile(kernel, precision, *dims, queries).num_warps == 4


def test_wide_heads_run_on_the_reference_without_tensor_cores(monkeypatch):
    narrow, wide = (torch.zeros(1, 4, 1, channels) for channels in (64, 65))

    def is_covered(query, value):
        return triton_launch._call(query, value, [1, 4], 0.0, 1.0).is_covered()

    assert is_covered(wide, wide)
    monkeypatch.setattr(triton_launch, "has_tensor_cores", lambda device: False)
    assert is_covered(narrow, narrow)
    assert not is_covered(narrow, wide)


def test_which_gpus_have_tensor_cores_for_triton(monkeypatch):
    capabilities = {0: (7, 5), 1: (8, 0), 2: (12, 0)}
    monkeypatch.setattr(_triton.gpus, "capability", capabilities.get)
    found = [_triton.has_tensor_cores(torch.device("cuda", index)) for index in capabilities]
    assert found == [False, True, True]
    assert _triton.has_tensor_cores(torch.device("cpu"))  # in the interpreter


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("groups", "dtype", "dims", "fits"),
    [
        (QueryGroups(11, 300), torch.bfloat16, (32, 32), True),
        (QueryGroups(11, 300), torch.float16, (1, 17), True),
        (QueryGroups(1, 1), HALF, (32, 32), True),
        (QueryGroups(3, 320), HALF, (32, 32), True),
        (QueryGroups(3, 321), HALF, (32, 32), False),
        (QueryGroups(11, 300), torch.float32, (32, 32), False),
        (QueryGroups(11, 300), HALF, (33, 32), False),
        (QueryGroups(11, 300), HALF, (32, 33), False),
        (QueryGroups(11, 300), HALF, (0, 32), False),
        (QueryGroups(11, 100, 1, 3), HALF, (32, 32), False),
        (QueryGroups(11, 100, 1, 3, denoising_scope="every"), HALF, (32, 32), False),
    ],
    ids=str,
)
def test_what_one_kernel_can_do(groups, dtype, dims, fits):
    assert one_block.fits(groups, dtype, *dims) == fits
    with attention_one_block(True):
        assert one_block.serves(groups, dtype, *dims, problems=1, gpu=one_block.Gpu(132, (9, 0))) == fits
    with attention_one_block(False):
        assert not one_block.serves(groups, dtype, *dims, problems=1000, gpu=one_block.Gpu(1, (9, 0)))


@pytest.mark.parametrize(
    ("groups", "problems", "serves"),
    [
        (QueryGroups(11, 300), 16, True),  # 2 images of 8 heads: 176 programs
        (QueryGroups(11, 300), 11, False),
        (QueryGroups(11, 300), 12, True),  # one for each multiprocessor
        (QueryGroups(11, 65), 11, False),
        (QueryGroups(11, 64), 1, True),
        (QueryGroups(11, 33), 1, True),
        (QueryGroups(11, 32), 1, False),
        (QueryGroups(11, 32), 12, True),
        (QueryGroups(11, 17), 1, False),
        (QueryGroups(11, 16), 1, True),
    ],
    ids=str,
)
def test_where_one_kernel_pays(groups, problems, serves, monkeypatch):
    monkeypatch.setattr(_choices, "attention_one_block", "where it pays")
    for capability in ((8, 0), (9, 0), (12, 0)):
        gpu = one_block.Gpu(132, capability)
        assert one_block.serves(groups, HALF, 32, 32, problems=problems, gpu=gpu) == serves
    for capability in ((10, 0), (10, 3)):
        gpu = one_block.Gpu(132, capability)
        assert not one_block.serves(groups, HALF, 32, 32, problems=problems, gpu=gpu)
        with attention_one_block(True):
            assert one_block.serves(groups, HALF, 32, 32, problems=problems, gpu=gpu)


def test_which_groups_are_one_program_of_two_kernels():
    for queries in range(1, one_block.MAX_QUERIES + 1):
        tiles = [triton_launch._tile(kernel, "half", 32, 32, queries) for kernel in list(triton_launch._TILES)[1:]]
        assert one_block._is_one_program_of_two_kernels(queries) == all(queries <= tile.block for tile in tiles)


@pytest.mark.parametrize(("asked", "chosen"), [("1", "where it pays"), ("0", "never")])
def test_the_environment_is_read_when_the_package_is_imported(asked, chosen):
    program = """
import os, sys
import groupdetr_fast
del os.environ["GROUPDETR_FAST_ATTENTION_ONE_BLOCK"]
assert not [name for name in sys.modules if name.startswith("groupdetr_fast.ops") and "triton_" in name]
from groupdetr_fast.ops.grouped_attention import one_block
print(one_block._choices.attention_one_block)
"""
    environment = {**os.environ, "GROUPDETR_FAST_ATTENTION_ONE_BLOCK": asked}
    command = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout.strip() == chosen


def test_one_kernel_needs_tensor_cores(monkeypatch):
    tensors = [torch.zeros(1, 20, 1, 32, dtype=torch.float16)] * 2

    def launch():
        call = triton_launch._call(*tensors, QueryGroups(1, 20).as_ints(), 0.0, 1.0)
        gpu = one_block.Gpu(1, (9, 0))
        return triton_launch._one_block_launch((tensors[0].stride(),) * 4, "where it can", gpu, *call)

    triton_launch._one_block_launch.cache_clear()
    with attention_one_block(True):
        assert launch() is not None
        monkeypatch.setattr(triton_launch, "has_tensor_cores", lambda device: False)
        assert launch() is None


@pytest.mark.parametrize(
    ("queries", "tile", "tiles", "passes"),
    [
        (1, 32, 1, 1),
        (32, 32, 1, 1),
        (33, 64, 1, 1),
        (128, 64, 2, 1),
        (129, 64, 3, 1),
        (192, 64, 3, 1),
        (193, 64, 4, 2),
        (320, 64, 5, 2),
    ],
)
def test_tiles_and_passes_of_one_kernel(queries, tile, tiles, passes):
    chosen = triton_launch._one_block_tile(queries)
    assert triton_launch._one_block_constexprs(chosen, queries) == {"TILE": tile, "TILES": tiles}
    assert -(-tiles // (chosen.block // tile)) == passes


@pytest.mark.parametrize(
    ("precision", "dim", "architecture"),
    [
        ("fma", 3, 75),
        ("fma", 40, 75),
        ("half", 3, 90),
        ("half", 72, 80),
        ("tf32x3", 16, 90),
        ("tf32", 24, 80),
        ("ieee", 72, 120),
    ],
)
def test_compiles_for_unusual_arguments(precision, dim, architecture):
    for kernel in triton_launch._TILES:
        tile = triton_launch._tile(kernel, precision, dim, dim, 300)
        compile_for_unusual_arguments(
            triton_cases.compile_case(kernel, precision, dim, tile, dropout=True), architecture
        )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dim", [3, 24])
@pytest.mark.parametrize("queries", [100, 300], ids=["one pass", "two passes"])
def test_one_kernel_compiles_for_unusual_arguments(queries, dim, architecture):
    compile_for_unusual_arguments(triton_cases.one_block_case(dim, queries, dropout=True), architecture)


def compile_for_unusual_arguments(case, architecture):
    """Heads that fill no block, channels that are not adjacent, rows that are, and a threshold beyond 32 bits."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    channels = {"stride_qd": "i32", "stride_kd": "i64", "stride_ql": "constexpr", "threshold": "i64"}
    constexprs = {name: value for name, value in case.constexprs.items() if name not in channels}
    source = ASTSource(case.kernel, case.signature | channels, constexprs | {"stride_ql": 1})
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    assert compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


@pytest.fixture
def one_kernel(monkeypatch):
    """Inside, two kernels must not serve."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("one kernel needs tensor cores that Triton uses")
    monkeypatch.setattr(triton_launch, "_backward_launches", lambda *_: pytest.fail("two kernels serve"))
    triton_launch._one_block_launch.cache_clear()
    with attention_one_block(True):
        yield
    triton_launch._one_block_launch.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("queries", [7, 32, 64, 65, 100, 128, 129, 192, 256, 300, 320])
def test_one_kernel_matches_reference(queries, dtype, dropout_p, one_kernel):
    groups = QueryGroups(3, queries)
    inputs = make_inputs(groups, 32, 32 if queries % 2 else 24, batch=2, heads=2, dtype=dtype, device="cuda")
    check(inputs, settings(groups, dropout_p, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.6])
@pytest.mark.parametrize("queries", [100, 300])
@pytest.mark.parametrize(
    "view",
    [in_a_packed_projection, sequence_first, channels_outermost, surrounded_by_nan],
    ids=lambda view: view.__name__,
)
def test_one_kernel_takes_any_strides(view, queries, dropout_p, one_kernel):
    groups = QueryGroups(3, queries)
    inputs = make_inputs(groups, 24, batch=2, heads=2, dtype=torch.bfloat16, device="cuda")
    *views, grad = view([*inputs, torch.randn_like(inputs[2])])
    assert not views[0].is_contiguous()
    check(views, settings(groups, dropout_p, device="cuda"), grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.6])
def test_one_kernel_in_five_passes(dropout_p, one_kernel, monkeypatch):
    monkeypatch.setattr(triton_launch, "_one_block_tile", lambda _: triton_launch.Tile(64, 16, 4))
    groups = QueryGroups(3, 300)
    inputs = make_inputs(groups, 32, batch=2, heads=2, dtype=torch.bfloat16, device="cuda")
    check(inputs, settings(groups, dropout_p, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("queries", [100, 300])
def test_one_kernel_gives_the_same_again_and_in_a_cuda_graph(queries, dropout_p, one_kernel):
    groups = QueryGroups(11, queries)
    inputs = make_inputs(groups, 32, batch=2, heads=8, dtype=torch.bfloat16, device="cuda")
    arguments = settings(groups, dropout_p, device="cuda")
    out, lse = OP(*inputs, *arguments)
    first, second = (OP_BACKWARD(inputs[2], *inputs, out, lse, *arguments) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP_BACKWARD(inputs[2], *inputs, out, lse, *arguments)
    graph.replay()
    for results in (second, captured):
        assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(results, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "dim", "value_dim"),
    [
        (LAYOUTS["groups"], 16, 16),
        (LAYOUTS["first"], 24, 40),
        (LAYOUTS["every"], 128, 64),
        (QueryGroups(1, 65), 100, 7),
        (QueryGroups(11, 300), 32, 32),
        (QueryGroups(3, 300, 2, 90, denoising_scope="every"), 64, 64),
        (QueryGroups(2, 900, 5, 40), 16, 32),
        (QueryGroups(1, 300, 3, 70), 128, 128),
    ],
    ids=str,
)
def test_matches_reference(groups, dim, value_dim, dtype, dropout_p):
    inputs = make_inputs(groups, dim, value_dim, batch=2, heads=2, dtype=dtype, device="cuda")
    check(inputs, settings(groups, dropout_p, device="cuda"))


@pytest.mark.gpu
def test_tf32_only_if_allowed(tf32_allowed):
    groups = QueryGroups(3, 300)
    inputs = make_inputs(groups, 32, device="cuda")
    arguments = settings(groups, device="cuda")
    exact, _ = OP(*(tensor.double() for tensor in inputs), *arguments)
    allowed, _ = OP(*inputs, *arguments)
    torch.set_float32_matmul_precision("highest")
    precise, _ = OP(*inputs, *arguments)
    errors = [(out - exact).abs().max().item() for out in (allowed, precise)]
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 50


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_results_are_the_same_from_run_to_run(dtype, dropout_p):
    groups = QueryGroups(11, 300, 5, 40)
    inputs = make_inputs(groups, 32, batch=2, heads=8, dtype=dtype, device="cuda")
    arguments = settings(groups, dropout_p, device="cuda")
    results = []
    for _ in range(3):
        out, lse = OP(*inputs, *arguments)
        results.append((out, lse, *OP_BACKWARD(inputs[2], *inputs, out, lse, *arguments)))
    for result in results[1:]:
        assert all(torch.equal(tensor, first) for tensor, first in zip(result, results[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_cuda_graph(dropout_p):
    groups = LAYOUTS["first"]
    inputs = make_inputs(groups, 32, device="cuda")
    arguments = settings(groups, dropout_p, device="cuda")

    def step():
        out, lse = OP(*inputs, *arguments)
        return out, lse, *OP_BACKWARD(inputs[2], *inputs, out, lse, *arguments)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in inputs:
        tensor.mul_(0.5)
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_that_of_the_cpu(layout):
    groups = LAYOUTS[layout]
    inputs = make_inputs(groups, 32, heads=3)
    on_cpu, _ = OP(*inputs, *settings(groups, 0.4))
    on_gpu, _ = OP(*(tensor.cuda() for tensor in inputs), *settings(groups, 0.4, device="cuda"))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
