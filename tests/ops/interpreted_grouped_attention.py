"""The Triton kernels of grouped_attention against their reference; see test_triton_interpreted.py."""

import pytest
import torch

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops._dropout import keep_mask
from groupdetr_fast.ops.grouped_attention import triton_launch
from groupdetr_fast.ops.grouped_attention.reference import (
    grouped_attention_backward_reference,
    grouped_attention_reference,
)
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

LAYOUTS = {
    "groups": QueryGroups(2, 17),
    "first": QueryGroups(2, 15, 2, 3),
    "every": QueryGroups(2, 15, 1, 18, denoising_scope="every"),
}


def make_inputs(groups, dim=16, value_dim=None, *, batch=1, heads=1, dtype=torch.float32, device="cpu"):
    dims = dim, dim, value_dim or dim
    return [torch.randn(batch, groups.length, heads, size, dtype=torch.float64).to(device, dtype) for size in dims]


def settings(groups, dropout_p=0.0, scale=0.3, seed=123456789012345, device="cpu"):
    return groups.as_ints(), dropout_p, torch.tensor([seed], device=device) if dropout_p else None, scale


def run(inputs, arguments, grad=None):
    """``out, lse, grad_query, grad_key, grad_value`` and the gradient of ``out`` that the last three are for."""
    with poisoned_memory():
        out, lse = triton_launch.forward(*inputs, *arguments)
        grad = torch.randn_like(out) if grad is None else grad
        return out, lse, *triton_launch.backward(grad, *inputs, out, lse, *arguments), grad


def check(inputs, arguments, grad=None):
    out, lse, *grads, grad = run(inputs, arguments, grad)
    assert_matches_reference(out, lambda *args: grouped_attention_reference(*args)[0], *inputs, *arguments)
    torch.testing.assert_close(lse, grouped_attention_reference(*inputs, *arguments)[1])
    for index, actual in enumerate(grads):
        assert actual.is_contiguous()
        assert_matches_reference(
            actual,
            lambda *args, i=index: grouped_attention_backward_reference(*args)[i],
            *(grad, *inputs, out, lse, *arguments),
        )


@pytest.mark.parametrize(
    ("groups", "dim", "value_dim", "dtype", "dropout_p"),
    [
        (QueryGroups(1, 15), 16, 16, torch.float32, 0.3),
        (QueryGroups(3, 15), 32, 24, torch.float32, 0.0),
        (QueryGroups(1, 17), 24, 16, torch.float16, 0.0),
        (QueryGroups(3, 32), 1, 3, torch.float32, 0.3),
        (QueryGroups(1, 33), 64, 100, torch.float32, 0.0),
        (QueryGroups(3, 64), 32, 64, torch.float16, 0.3),
        (QueryGroups(1, 65), 128, 128, torch.float16, 0.0),
        (QueryGroups(1, 65), 100, 32, torch.float32, 0.3),
        (QueryGroups(1, 130), 32, 32, torch.float32, 0.0),
        (LAYOUTS["first"], 32, 32, torch.float32, 0.3),
        (LAYOUTS["every"], 16, 24, torch.float16, 0.0),
        (QueryGroups(2, 70, 3, 66), 32, 32, torch.float16, 0.3),
        (QueryGroups(2, 34, 1, 40, denoising_scope="every"), 24, 40, torch.float32, 0.3),
    ],
    ids=str,
)
def test_matches_reference(groups, dim, value_dim, dtype, dropout_p):
    check(make_inputs(groups, dim, value_dim, dtype=dtype), settings(groups, dropout_p))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "dim", "dtype", "dropout_p"),
    [
        (QueryGroups(3, 300), 32, torch.float32, 0.1),
        (QueryGroups(1, 300, 5, 40), 64, torch.float16, 0.1),
        (QueryGroups(2, 300, 1, 90, denoising_scope="every"), 32, torch.float16, 0.0),
        (QueryGroups(1, 300), 128, torch.float16, 0.1),
        (QueryGroups(1, 300), 128, torch.float32, 0.0),
        (QueryGroups(1, 900), 16, torch.float16, 0.0),
    ],
    ids=str,
)
def test_at_length(groups, dim, dtype, dropout_p):
    check(make_inputs(groups, dim, dtype=dtype), settings(groups, dropout_p))


@pytest.mark.parametrize("groups", [QueryGroups(1, 1), QueryGroups(3, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_one_query(groups, dropout_p):
    """One key has probability 1, whatever its score: value passes through, and the score has no gradient."""
    query, key, value = make_inputs(groups, heads=5)
    arguments = settings(groups, dropout_p)
    out, lse, grad_query, grad_key, grad_value, grad = run((query, key, value), arguments)
    factor = grouped_attention_reference(query, key, torch.ones_like(value), *arguments)[0]  # 1, or 0 and 2 if dropped
    torch.testing.assert_close(out, value * factor)
    torch.testing.assert_close(lse, (query * key).sum(-1).transpose(1, 2) * 0.3)
    torch.testing.assert_close(grad_value, grad * factor)
    for actual in (grad_query, grad_key):
        assert actual.abs().max() <= 32 * torch.finfo(actual.dtype).eps


def in_a_packed_projection(tensors):
    return torch.stack(tensors, dim=2).unbind(2)


def sequence_first(tensors):
    return [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]


def channels_outermost(tensors):
    return [tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for tensor in tensors]


def surrounded_by_nan(tensors):
    """Views into larger tensors of NaN, which show where more is read than there is."""
    wider = [torch.nn.functional.pad(tensor, (3, 2, 1, 2, 2, 1, 1, 1), value=float("nan")) for tensor in tensors]
    return [tensor[1:-1, 2:-1, 1:-2, 3:-2] for tensor in wider]


@pytest.mark.parametrize(
    "view",
    [in_a_packed_projection, sequence_first, channels_outermost, surrounded_by_nan],
    ids=lambda view: view.__name__,
)
def test_strides(view):
    groups = QueryGroups(2, 15, 1, 3)
    inputs = make_inputs(groups, 20, batch=2, heads=2)
    *expected, grad = run(inputs, arguments := settings(groups, 0.3))
    *views, grad_view = view([*inputs, grad])
    assert not views[0].is_contiguous()
    *actual, _ = run(views, arguments, grad_view)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert tensor.is_contiguous()
        assert torch.equal(tensor, wanted)


def test_expanded_gradient():
    """The gradient of a sum is one number, with strides of 0."""
    groups = LAYOUTS["first"]
    check(make_inputs(groups), settings(groups), torch.ones(()).expand(1, groups.length, 1, 16))


@pytest.mark.parametrize(
    ("dropout_p", "seed"),
    [
        (0.3, 123456789012345),
        (0.75, -5),
        (1e-12, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.1, 0), (0.5, 2**63 - 1), (0.999, 2**32))),
    ],
)
def test_dropout_keeps_what_its_definition_keeps(dropout_p, seed):
    groups = QueryGroups(2, 17, 1, 3, denoising_scope="every")
    length, heads = groups.length, 2
    query = torch.zeros(2, length, heads, 16)
    unit_values = torch.eye(length)[None, :, None].expand(2, length, heads, length)
    arguments = settings(groups, dropout_p, seed=seed)
    out, _, _, _, grad_value, _ = run((query, query, unit_values), arguments, unit_values)
    head, row, column = (
        torch.arange(2 * heads).view(2, 1, heads, 1),
        torch.arange(length)[:, None, None],
        torch.arange(length),
    )
    keep = keep_mask(arguments[2], dropout_p, head, row, column) & groups.attention_mask()[:, None]  # [B, L, H, L]
    assert torch.equal(out > 0, keep)
    assert torch.equal(grad_value > 0, keep.transpose(1, 3))


def test_dropout_keeps_the_threshold_itself():
    """With p = hash / 2**32 the comparison meets equality, which no other test does."""
    arguments = settings(QueryGroups(1, 1), 0.5)
    place = (torch.tensor(0),) * 3
    low, high = 0, 2**32  # the hash is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        kept = keep_mask(arguments[2], middle / 2**32, *place).item()
        low, high = (middle, high) if kept else (low, middle)
    ones = torch.ones(1, 1, 1, 16)
    for number, kept in ((low, True), (low + 1, False)):
        out, _ = triton_launch.forward(ones, ones, ones, arguments[0], number / 2**32, *arguments[2:])
        assert (out != 0).all() if kept else (out == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_scores(dtype, sign):
    """Scores near 1000, all of one sign: their exponentials overflow, or vanish."""
    groups = LAYOUTS["first"]
    query, key, value = make_inputs(groups, dtype=dtype)
    query, key = query.abs(), sign * (key.abs() + 10)
    arguments = settings(groups, scale=8.0)
    out, lse, *grads, grad = run((query, key, value), arguments)
    assert lse.abs().min() > 300
    exact = [tensor.double() for tensor in (query, key, value)]
    torch.testing.assert_close(out.double(), grouped_attention_reference(*exact, *arguments)[0], rtol=0, atol=1e-2)
    references = grouped_attention_backward_reference(grad.double(), *exact, out, lse, *arguments)
    for actual, expected in zip(grads, references, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("layout", "dropout_p"),
    [
        *((layout, 0.0) for layout in LAYOUTS),
        ("groups", 0.3),
        *(pytest.param(layout, 0.3, marks=pytest.mark.slow) for layout in LAYOUTS if layout != "groups"),
    ],
)
def test_a_segment_reads_and_writes_nothing_else(layout, dropout_p):
    """What no query of a segment may see can be NaN; and what sees none of its queries receives no gradient."""
    groups = LAYOUTS[layout]
    mask = groups.attention_mask()
    inputs = make_inputs(groups)
    arguments = settings(groups, dropout_p)
    clean, _ = triton_launch.forward(*inputs, *arguments)
    for start, stop, _ in groups.segments:
        hidden = ~mask[start]
        polluted = [tensor.clone() for tensor in inputs]
        for tensor in polluted:
            tensor[:, hidden] = float("nan")
        out, _ = triton_launch.forward(*polluted, *arguments)
        assert torch.equal(out[:, start:stop], clean[:, start:stop])

        grad = torch.zeros_like(clean)
        grad[:, start:stop] = 1
        _, _, grad_query, grad_key, grad_value, _ = run(inputs, arguments, grad)
        assert (grad_query[:, :start] == 0).all()
        assert (grad_query[:, stop:] == 0).all()
        for tensor in (grad_key, grad_value):
            assert (tensor[:, hidden] == 0).all()
            assert (tensor[:, ~hidden] != 0).any(dim=(2, 3)).all() or dropout_p > 0


@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0}])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(change, dropout_p):
    groups = LAYOUTS["first"]
    inputs = make_inputs(groups, **change)
    out, lse, *grads, _ = run(inputs, settings(groups, dropout_p))
    assert out.shape == inputs[2].shape
    assert lse.shape == (out.shape[0], out.shape[2], groups.length)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]


@pytest.mark.parametrize(
    ("dims", "dtype", "scale"),
    [
        ((16, 16), torch.float64, 0.3),
        ((129, 16), torch.float32, 0.3),
        ((16, 200), torch.float16, 0.3),
        ((0, 16), torch.float32, 0.3),
        ((16, 16), torch.float32, -0.3),
        ((16, 16), torch.float32, 0.0),
    ],
)
def test_reference_runs_what_the_kernels_do_not_cover(dims, dtype, scale):
    groups = LAYOUTS["first"]
    query, key = (torch.randn(1, groups.length, 2, dims[0]).to(dtype) for _ in range(2))
    inputs = query, key, torch.randn(1, groups.length, 2, dims[1]).to(dtype)
    arguments = settings(groups, 0.2, scale)
    out, lse, *grads, grad = run(inputs, arguments)
    for actual, expected in zip((out, lse), grouped_attention_reference(*inputs, *arguments), strict=True):
        assert torch.equal(actual, expected)
    references = grouped_attention_backward_reference(grad, *inputs, out, lse, *arguments)
    assert all(torch.equal(actual, expected) for actual, expected in zip(grads, references, strict=True))


@pytest.mark.parametrize(
    ("precision", "dim"), [("tf32", 32), ("tf32", 64), ("tf32", 128), ("ieee", 128), ("fma", 32), ("fma", 64)]
)
def test_tiles_of_other_precisions(precision, dim, monkeypatch):
    """The interpreter computes products in float32 whatever the precision."""
    monkeypatch.setattr(triton_launch, "precision_of", lambda *_: precision)
    groups = QueryGroups(1, 50, 1, 20)
    check(make_inputs(groups, dim), settings(groups))
