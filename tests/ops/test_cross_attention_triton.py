"""The Triton kernels of cross_attention: their tiles, and how they do on a GPU.

The numbers are tested without one in interpreted_cross_attention.py, and test_cross_attention.py runs on a GPU too.
"""

import pytest
import torch

pytest.importorskip("triton")

from interpreted_cross_attention import check, make_inputs, make_padding, settings

from groupdetr_fast.ops.cross_attention import triton_cases, triton_launch

OP = torch.ops.groupdetr_fast.cross_attention
OP_BACKWARD = torch.ops.groupdetr_fast.cross_attention_backward
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def precisions():
    """``{precision: heads that are computed with it}`` for all dtypes, with TF32 and without."""
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            for dtype in DTYPES:
                for dims in ((1, 128), (16, 8), (64, 32), (24, 32), (33, 1), (128, 100)):
                    found.setdefault(triton_launch.precision_of(dtype, *dims), set()).add(dims)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def test_every_size_has_a_tile(precisions):
    assert set(precisions) == {"half", "tf32", "tf32x3", "ieee"}
    for kernel in triton_launch._TILES:
        for precision, sizes in precisions.items():
            assert all(triton_launch._tile(kernel, precision, *dims).block >= 16 for dims in sizes)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "chunks"),
    [(2, 3300, 1050, 2), (1, 3300, 1050, 4), (16, 3300, 1050, 1), (1, 300, 1050, 1), (1, 3300, 5, 7), (0, 0, 0, 1)],
)
def test_chunks_cover_all_queries(batch, queries, keys, chunks):
    """Few programs become more, but none has next to nothing to do."""
    query = torch.empty(batch, queries, 8, 64, dtype=torch.float16, device="meta")
    key = torch.empty(batch, keys, 8, 64, device="meta")
    found, in_each = triton_launch._chunks(triton_launch._call(query, key, key[..., :32], None, 0.0, 1.0))
    assert found == chunks
    assert (found - 1) * in_each < max(queries, 1) <= max(found * in_each, 1)


@pytest.mark.parametrize(
    ("precision", "dim", "architecture"),
    [("half", 3, 90), ("half", 72, 80), ("tf32x3", 16, 90), ("tf32", 24, 80), ("ieee", 72, 120)],
)
def test_compiles_for_unusual_arguments(precision, dim, architecture):
    """Heads that fill no block, channels that are not adjacent, rows that are, and a threshold beyond 32 bits."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel in triton_launch._TILES:
        tile = triton_launch._tile(kernel, precision, dim, dim)
        case = triton_cases.compile_case(kernel, precision, (dim, dim), tile, dropout=True)
        channels = {"stride_qd": "i32", "stride_kd": "i64", "stride_ql": "constexpr", "threshold": "i64"}
        constexprs = {name: value for name, value in case.constexprs.items() if name not in channels}
        source = ASTSource(kernel, case.signature | channels, constexprs | {"stride_ql": 1})
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        assert compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


@pytest.mark.parametrize("kernel", list(triton_launch._TILES)[:2], ids=lambda kernel: kernel.__name__)
def test_rows_of_keys_are_looked_up_ahead(kernel):
    """Keys and values arrive by asynchronous copies, though where they are must be read first."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    copies = []
    for padding in (True, False):
        tile = triton_launch._tile(kernel, "half", 64, 32)
        case = triton_cases.compile_case(kernel, "half", (64, 32), tile, dropout=True, padding=padding)
        source = ASTSource(kernel, case.signature, case.constexprs, case.attributes())
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        copies.append(compiled.asm["ttgir"].count("async_copy_global_to_local"))
    assert copies[0] > copies[1] > 0  # those of the list of keys besides


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "width", "dims"),
    [
        (3300, 1050, 42, (64, 32)),
        (900, 1050, 42, (32, 32)),
        (70, 33, None, (24, 40)),
        (65, 130, 13, (128, 64)),
        (17, 65, None, (100, 7)),
        (1050, 1050, 42, (128, 128)),
    ],
    ids=str,
)
def test_matches_reference(queries, keys, width, dims, dtype, dropout_p):
    inputs = make_inputs(queries, keys, *dims, batch=2, heads=2, dtype=dtype, device="cuda")
    for padding in (make_padding(2, keys, width, device="cuda"), None):
        check(inputs, padding, settings(dropout_p, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_results_are_the_same_from_run_to_run(dtype, dropout_p):
    inputs = make_inputs(3300, 1050, 64, 32, batch=2, heads=8, dtype=dtype, device="cuda")
    inputs.append(make_padding(2, 1050, 42, device="cuda"))
    arguments = settings(dropout_p, device="cuda")
    results = []
    for _ in range(3):
        out, lse = OP(*inputs, *arguments)
        results.append((out, lse, *OP_BACKWARD(torch.ones_like(out), *inputs, out, lse, *arguments)))
    for result in results[1:]:
        assert all(torch.equal(tensor, first) for tensor, first in zip(result, results[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_cuda_graph(dropout_p):
    """A graph reads the padding anew."""
    inputs = make_inputs(700, 130, 64, 32, batch=2, device="cuda", dtype=torch.float16)
    padding = make_padding(2, 130, 13, device="cuda")
    arguments = settings(dropout_p, device="cuda")

    def step():
        out, lse = OP(*inputs, padding, *arguments)
        return out, lse, *OP_BACKWARD(torch.ones_like(out), *inputs, padding, out, lse, *arguments)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in inputs:
        tensor.mul_(0.5)
    padding.logical_not_()
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_dropout_is_that_of_the_cpu():
    inputs = [*make_inputs(70, 130, 32, heads=3), make_padding(1, 130, 13)]
    on_cpu, _ = OP(*inputs, *settings(0.4))
    on_gpu, _ = OP(*(tensor.cuda() for tensor in inputs), *settings(0.4, device="cuda"))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
