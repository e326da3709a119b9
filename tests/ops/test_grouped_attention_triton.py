"""The Triton kernels of grouped_attention: their tiles, and how they do on a GPU.

The numbers are tested without one in interpreted_grouped_attention.py, and test_grouped_attention.py runs on a GPU too.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted_grouped_attention import LAYOUTS, check, make_inputs, settings

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops import _triton
from groupdetr_fast.ops.grouped_attention import triton_cases, triton_launch

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
    """Heads that fill no block, channels that are not adjacent, rows that are, and a threshold beyond 32 bits."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel in triton_launch._TILES:
        tile = triton_launch._tile(kernel, precision, dim, dim, 300)
        case = triton_cases.compile_case(kernel, precision, dim, tile, dropout=True)
        channels = {"stride_qd": "i32", "stride_kd": "i64", "stride_ql": "constexpr", "threshold": "i64"}
        constexprs = {name: value for name, value in case.constexprs.items() if name not in channels}
        source = ASTSource(kernel, case.signature | channels, constexprs | {"stride_ql": 1})
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        assert compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


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
