"""The one kernel for the backward pass of grouped_attention against its reference; see test_triton_interpreted.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from interpreted_grouped_attention import (
    LAYOUTS,
    channels_outermost,
    check,
    in_a_packed_projection,
    make_inputs,
    run,
    sequence_first,
    settings,
    surrounded_by_nan,
)

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops._triton_attention import Tile
from groupdetr_fast.ops.grouped_attention import triton_blocks, triton_launch, triton_one_block
from groupdetr_fast.ops.grouped_attention.dropout import keep_mask
from groupdetr_fast.ops.grouped_attention.reference import grouped_attention_reference
from groupdetr_fast.testing import attention_one_block


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch):
    """Two kernels must not serve. The interpreter also computes float32, which shows errors that rounding hides."""
    monkeypatch.setattr(triton_launch, "serves", lambda *_, **__: True)
    monkeypatch.setattr(triton_launch, "_backward_launches", lambda *_: pytest.fail("two kernels serve"))
    forget()
    with attention_one_block(True):
        yield
    forget()


def forget():
    triton_launch._one_block_launch.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch):
    """Passes of two tiles of 16 keys, so that few queries take several passes, the last one shorter."""
    monkeypatch.setattr(triton_launch, "MAX_TILE", 16)
    monkeypatch.setattr(triton_launch, "_ONE_BLOCK_TILES", {320: Tile(32, 16, 2)})


@pytest.mark.parametrize("queries", [7, 32, 33, 64, 65, 100, 128, 129])
@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.float16, 0.0), (torch.float32, 0.3)], ids=str)
def test_matches_reference(queries, dtype, dropout_p):
    groups = QueryGroups(1 if queries > 33 else 3, queries)
    check(make_inputs(groups, 32, dtype=dtype), settings(groups, dropout_p))


@pytest.mark.parametrize("groups", [QueryGroups(1, 1), QueryGroups(3, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_one_query(groups, dropout_p):
    """One key has probability 1, whatever its score: the score has no gradient."""
    inputs = make_inputs(groups, heads=5)
    arguments = settings(groups, dropout_p)
    _, _, grad_query, grad_key, grad_value, grad = run(inputs, arguments)
    factor = grouped_attention_reference(*inputs[:2], torch.ones_like(inputs[2]), *arguments)[0]  # 1, or 0 and 2
    torch.testing.assert_close(grad_value, grad * factor)
    for actual in (grad_query, grad_key):
        assert actual.abs().max() <= 32 * torch.finfo(actual.dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("queries", [100, 256, 300, 320])
@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.float16, 0.1), (torch.float32, 0.0)], ids=str)
def test_at_length(queries, dtype, dropout_p):
    groups = QueryGroups(2 if queries == 100 else 1, queries)
    check(make_inputs(groups, 32, dtype=dtype), settings(groups, dropout_p))


@pytest.mark.parametrize("queries", [15, 16, 33, 70])
@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.float32, 0.0), (torch.float16, 0.3)], ids=str)
def test_in_one_pass_and_in_several(queries, dtype, dropout_p, small_tiles):
    groups = QueryGroups(2, queries)
    check(make_inputs(groups, 24, 9, heads=2, dtype=dtype), settings(groups, dropout_p))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 3), (16, 32), (24, 17), (32, 1)])
def test_heads(dim, value_dim, small_tiles):
    groups = QueryGroups(2, 37)
    check(make_inputs(groups, dim, value_dim), settings(groups, 0.3))


@pytest.mark.parametrize(
    "view",
    [in_a_packed_projection, sequence_first, channels_outermost, surrounded_by_nan],
    ids=lambda view: view.__name__,
)
def test_strides(view, small_tiles):
    groups = QueryGroups(2, 37)
    inputs = make_inputs(groups, 20, batch=2)
    *expected, grad = run(inputs, arguments := settings(groups, 0.3))
    *views, grad_view = view([*inputs, grad])
    assert not views[0].is_contiguous()
    *actual, _ = run(views, arguments, grad_view)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert tensor.is_contiguous()
        assert torch.equal(tensor, wanted)


def test_expanded_gradient():
    groups = QueryGroups(2, 20)
    check(make_inputs(groups), settings(groups), torch.ones(()).expand(1, groups.length, 1, 16))


@pytest.mark.parametrize(
    ("dropout_p", "seed"), [(0.1, 0), (0.3, 123456789012345), (0.5, 2**63 - 1), (0.75, -5), (0.999, 2**32), (1e-12, 1)]
)
def test_dropout_keeps_what_its_definition_keeps(dropout_p, seed, small_tiles):
    groups = QueryGroups(2, 37)
    length, heads = groups.length, 2
    query = torch.zeros(2, length, heads, 16)
    unit_values = torch.eye(length)[None, :, None].expand(2, length, heads, length)
    arguments = settings(groups, dropout_p, seed=seed)
    _, _, _, _, grad_value, _ = run((query, query, unit_values), arguments, unit_values)
    head, row, column = (
        torch.arange(2 * heads).view(2, 1, heads, 1),
        torch.arange(length)[:, None, None],
        torch.arange(length),
    )
    keep = keep_mask(arguments[2], dropout_p, head, row, column) & groups.attention_mask()[:, None]  # [B, L, H, L]
    assert torch.equal(grad_value > 0, keep.transpose(1, 3))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign, small_tiles):
    """Scores near 1000, all of one sign: their exponentials overflow, or vanish."""
    groups = QueryGroups(2, 37)
    query, key, value = make_inputs(groups)
    inputs, arguments = (query.abs(), sign * (key.abs() + 10), value), settings(groups, scale=8.0)
    _, lse, *grads, grad = run(inputs, arguments)
    assert lse.abs().min() > 300
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(grouped_attention_reference(*exact, *arguments)[0], exact, grad.double())
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-2 * wanted.abs().max().item())


def test_a_group_reads_and_writes_nothing_else(small_tiles):
    """Another group can be NaN; and a group without a gradient gets none."""
    groups = QueryGroups(3, 37)
    inputs, arguments = make_inputs(groups), settings(groups, 0.3)
    out, lse = triton_launch.forward(*inputs, *arguments)
    grad = torch.randn_like(out)
    clean = triton_launch.backward(grad, *inputs, out, lse, *arguments)
    own, others = slice(37, 74), torch.tensor([*range(37), *range(74, 111)])
    polluted = [tensor.clone().index_fill_(1, others, float("nan")) for tensor in (grad, *inputs, out)]
    of_other_lse = lse.clone().index_fill_(2, others, float("nan"))
    found = triton_launch.backward(*polluted, of_other_lse, *arguments)
    alone = triton_launch.backward(grad.index_fill(1, others, 0), *inputs, out, lse, *arguments)
    for tensor, only, wanted in zip(found, alone, clean, strict=True):
        assert torch.equal(tensor[:, own], wanted[:, own])
        assert torch.equal(only[:, own], wanted[:, own])
        assert (only[:, others] == 0).all()


@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0}])
def test_empty(change):
    groups = QueryGroups(2, 37)
    inputs = make_inputs(groups, **change)
    _, _, *grads, _ = run(inputs, settings(groups, 0.5))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]


FAULTS = {
    "delta of keys beyond the end": ("delta = delta * is_key[:, None]", "delta = delta * 1.0"),
    "no tile is the last": ("if tile == TILES - 1:", "if tile == TILES:"),
    "passes do not add up": ("if FIRST_TILE > 0:", "if FIRST_TILE < 0:"),
    "the first pass writes the gradient alone": ("if STOP_TILE < TILES:", "if FIRST_TILE > 0:"),
    "the last tile is left out": ("< TILES * TILE else TILES,", "< TILES * TILE else TILES - 1,"),
    "columns of dropout start anew": ("first + tl.arange(0, TILE))", "start + tl.arange(0, TILE))"),
    "rows of dropout start anew": (
        "rows = start + index * TILE + tl.arange(0, TILE)",
        "rows = start + tl.arange(0, TILE)",
    ),
    "dropped probabilities count for values": ("dropped = tl.where(keep,", "dropped = tl.where(keep | True,"),
    "keys start alike": ("key, first, stop - first,", "key, start, stop - start,"),
    "groups start alike": ("tl.program_id(0) % num_groups * queries_per_group", "tl.program_id(0) * 0"),
    "no scale": ("result *= scale * keep_scale", "result *= keep_scale"),
    "log-sum-exp of the first problem": ("lse += problem.to(tl.int64) * length", "lse += 0 * length"),
}


def with_fault(right, wrong, folder, monkeypatch):
    """The kernel's module with one text in place of another, in itself or in the parts that it is made of."""
    faulty, found = {}, 0
    for module in (triton_blocks, triton_one_block):
        source = Path(module.__file__).read_text()
        found += right in source
        name = module.__name__.rpartition(".")[2]
        path = folder / f"faulty_{name}.py"
        path.write_text(source.replace(right, wrong).replace("from .triton_blocks", "from .faulty_triton_blocks"))
        spec = importlib.util.spec_from_file_location(f"{module.__package__}.faulty_{name}", path)
        faulty[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, faulty[name])
        spec.loader.exec_module(faulty[name])
    assert found == 1
    return faulty["triton_one_block"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path, monkeypatch, small_tiles):
    faulty = with_fault(*FAULTS[fault], tmp_path, monkeypatch)
    groups = QueryGroups(2, 53)
    inputs, arguments = make_inputs(groups, 32, 16, heads=2), settings(groups, 0.3)
    check(inputs, arguments)
    forget()
    monkeypatch.setattr(
        triton_launch, "_grouped_attention_bwd_one_block_kernel", faulty._grouped_attention_bwd_one_block_kernel
    )
    with pytest.raises(AssertionError):
        check(inputs, arguments)


def test_two_kernels_serve_where_one_does_not(monkeypatch):
    """Whatever is asked for: the rule is not overruled here."""
    monkeypatch.undo()
    forget()
    for groups, dtype, dim in (
        (LAYOUTS["first"], torch.float16, 16),
        (LAYOUTS["groups"], torch.float32, 16),
        (LAYOUTS["groups"], torch.float16, 33),
    ):
        with attention_one_block(True):
            check(make_inputs(groups, dim, dtype=dtype), settings(groups, 0.3))
        assert triton_launch._one_block_launch.cache_info().currsize > 0
    launches = triton_launch._backward_launches.cache_info().currsize
    assert launches >= 3
