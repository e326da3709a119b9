import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops import grouped_attention
from groupdetr_fast.ops.grouped_attention import cpu
from groupdetr_fast.ops.grouped_attention.reference import (
    grouped_attention_backward_reference,
    grouped_attention_reference,
)
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

OP = torch.ops.groupdetr_fast.grouped_attention
OP_BACKWARD = torch.ops.groupdetr_fast.grouped_attention_backward

LAYOUTS = {
    "one_query": QueryGroups(1, 1),
    "one_group": QueryGroups(1, 7),
    "groups_of_one": QueryGroups(5, 1),
    "groups": QueryGroups(3, 6),
    "long_groups": QueryGroups(2, 67),
    "denoising_first": QueryGroups(3, 5, 4, 3),
    "denoising_every": QueryGroups(3, 5, 2, 3, denoising_scope="every"),
    "denoising_one_group": QueryGroups(1, 4, 1, 9),
}
WITH_AND_WITHOUT_DENOISING = ["groups", "denoising_first", "denoising_every"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_inputs(groups, device="cpu", *, batch=2, heads=2, dim=8, value_dim=None, dtype=torch.float32):
    shape = (batch, groups.length, heads)
    query, key = (torch.randn(*shape, dim, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return query, key, torch.randn(*shape, value_dim or dim, dtype=torch.float64).to(device, dtype)


def make_seed(device, number=123456789012345):
    return torch.tensor([number], device=device)


def settings(groups, device, dropout_p=0.0, scale=0.3):
    return groups.as_ints(), dropout_p, make_seed(device) if dropout_p else None, scale


def masked_sdpa(query, key, value, groups):
    """torch's attention under an explicit mask, [B, L, H, Dv]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, groups.attention_mask(query.device)).transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(layout, dropout_p, value_dim, dtype, device):
    groups = LAYOUTS[layout]
    inputs = make_inputs(groups, device, value_dim=value_dim, dtype=DTYPES[dtype])
    arguments = settings(groups, device, dropout_p)
    with poisoned_memory():
        out, lse = OP(*inputs, *arguments)
        grad = torch.randn_like(out)
        grads = OP_BACKWARD(grad, *inputs, out, lse, *arguments)
    assert_matches_reference(out, lambda *args: grouped_attention_reference(*args)[0], *inputs, *arguments)
    # torch's kernel for half types takes exponentials to 20 bits; these are still far below the result's own precision.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if inputs[0].dtype.itemsize == 2 else {}
    torch.testing.assert_close(lse, grouped_attention_reference(*inputs, *arguments)[1], **tolerance)
    for index, actual in enumerate(grads):
        if layout in ("one_query", "groups_of_one") and index < 2:
            # One key has probability 1 whatever its score: the exact gradient is 0, a difference of equal numbers.
            assert actual.abs().max() <= 16 * torch.finfo(actual.dtype).eps
            continue
        assert_matches_reference(
            actual,
            lambda *args, i=index: grouped_attention_backward_reference(*args)[i],
            *(grad, *inputs, out, lse, *arguments),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_equals_masked_sdpa(layout, value_dim, device):
    groups = LAYOUTS[layout]
    inputs = [
        tensor.requires_grad_() for tensor in make_inputs(groups, device, value_dim=value_dim, dtype=torch.float64)
    ]
    expected = masked_sdpa(*inputs, groups)
    out = grouped_attention(*inputs, groups)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_an_integer_stands_for_that_many_groups(device):
    inputs = make_inputs(QueryGroups(3, 4), device)
    assert torch.equal(grouped_attention(*inputs, 3), grouped_attention(*inputs, QueryGroups(3, 4)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_blocks_of_rows_and_of_problems(dropout_p, device, monkeypatch):
    """The explicit path, cut into blocks so small that every kind of cut occurs, gives the same numbers."""
    groups = LAYOUTS["denoising_every"]
    inputs = make_inputs(groups, device, value_dim=5, dtype=torch.float64)
    arguments = settings(groups, device, dropout_p)
    grad = torch.randn(inputs[2].shape, dtype=torch.float64, device=device)
    results = []
    for elements in (1, 25, 70, 1 << 20):
        monkeypatch.setattr(cpu, "_BLOCK_ELEMENTS", elements)
        out, lse = OP(*inputs, *arguments)
        results.append((out, lse, *OP_BACKWARD(grad, *inputs, out, lse, *arguments)))
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "groups",
    [QueryGroups(1, 1), QueryGroups(2, 3), QueryGroups(2, 2, 2, 1), QueryGroups(2, 1, 1, 2, denoising_scope="every")],
    ids=["one_query", "groups", "denoising_first", "denoising_every"],
)
@pytest.mark.parametrize("value_dim", [3, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(groups, value_dim, dropout_p, device):
    inputs = make_inputs(groups, device, batch=1, dim=3, value_dim=value_dim, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    arguments = settings(groups, device, dropout_p)
    assert torch.autograd.gradcheck(lambda *tensors: OP(*tensors, *arguments)[0], inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", WITH_AND_WITHOUT_DENOISING)
def test_groups_and_images_never_leak(layout, dropout_p, device):
    """Gradients are exactly zero for every key that the mask hides, and for every other image."""
    groups = LAYOUTS[layout]
    mask = groups.attention_mask(device)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(groups, device)]
    out, _ = OP(*inputs, *settings(groups, device, dropout_p))
    for start, _, _ in groups.segments:
        grads = torch.autograd.grad(out[1, start].sum(), inputs, retain_graph=True)
        for grad in grads:
            assert (grad[0] == 0).all()
            assert dropout_p > 0 or (grad[1, start] != 0).any()
        assert (grads[0][1, torch.arange(groups.length, device=device) != start] == 0).all()
        for grad in grads[1:]:
            assert (grad[1, ~mask[start]] == 0).all()
            assert dropout_p > 0 or (grad[1, mask[start]] != 0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("value_dim", [8, 5])
def test_groups_at_once_equal_separate_calls(value_dim, device):
    groups = QueryGroups(4, 9)
    inputs = make_inputs(groups, device, value_dim=value_dim)
    together = grouped_attention(*inputs, groups)
    for group in range(4):
        rows = slice(*groups.group_range(group))
        alone = grouped_attention(*(tensor[:, rows] for tensor in inputs), 1)
        torch.testing.assert_close(together[:, rows], alone)


@pytest.mark.parametrize("scope", ["first", "every"])
def test_matching_queries_do_not_notice_denoising(scope, device):
    groups = QueryGroups(3, 5, 2, 4, denoising_scope=scope)
    inputs = make_inputs(groups, device)
    matching = (tensor[:, groups.denoising_length :] for tensor in inputs)
    torch.testing.assert_close(
        grouped_attention(*inputs, groups)[:, groups.denoising_length :], grouped_attention(*matching, 3)
    )


def test_scores_of_very_different_size(device):
    """Two parts of a denoising query's keys whose exponentials could not share one scale."""
    groups = QueryGroups(1, 2, 1, 2)
    query, key, value = make_inputs(groups, device, dim=4)
    key[:, 2:] *= 1000
    out = grouped_attention(query, key, value, groups, scale=1.0)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, grouped_attention_reference(query, key, value, groups.as_ints(), 0.0, None, 1.0)[0])


@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0}])
@pytest.mark.parametrize("layout", WITH_AND_WITHOUT_DENOISING)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_sizes(change, layout, dropout_p, device):
    groups = LAYOUTS[layout]
    inputs = [tensor.requires_grad_() for tensor in make_inputs(groups, device, **change)]
    out = grouped_attention(*inputs, groups, dropout_p=dropout_p)
    assert out.shape == inputs[2].shape
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


def test_zero_channels(device):
    query = torch.zeros(2, 6, 2, 0, device=device)
    value = torch.randn(2, 6, 2, 3, device=device)
    mean = value.unflatten(1, (2, 3)).mean(2, keepdim=True).expand(2, 2, 3, 2, 3).flatten(1, 2)
    torch.testing.assert_close(grouped_attention(query, query, value, 2), mean)
    assert grouped_attention(value, value, query, 2).shape == query.shape


def permuted(tensor):
    """The same numbers, dense, in another order in memory."""
    return tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)


@pytest.mark.parametrize("layout", WITH_AND_WITHOUT_DENOISING)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_layout_does_not_matter(layout, value_dim, device):
    groups = LAYOUTS[layout]
    inputs = make_inputs(groups, device, value_dim=value_dim)
    arguments = settings(groups, device)
    out, lse = OP(*inputs, *arguments)
    grad = torch.randn_like(out)
    grads = OP_BACKWARD(grad, *inputs, out, lse, *arguments)
    sequence_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    for others in ([permuted(tensor) for tensor in inputs], sequence_first):
        assert not others[0].is_contiguous()
        other_out, other_lse = OP(*others, *arguments)
        other_grads = OP_BACKWARD(permuted(grad), *others, permuted(out), lse, *arguments)
        for actual, expected in zip((other_out, other_lse, *other_grads), (out, lse, *grads), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.is_contiguous()
    expanded = torch.ones(1, 1, 1, 1, device=device).expand(out.shape)
    for actual, expected in zip(
        OP_BACKWARD(expanded, *inputs, out, lse, *arguments),
        OP_BACKWARD(expanded.contiguous(), *inputs, out, lse, *arguments),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("memory", ["contiguous", "permuted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("layout", "dtype"), [("groups", "float32"), ("denoising_first", "bfloat16")])
def test_opcheck(memory, dropout_p, layout, dtype, device):
    groups = LAYOUTS[layout]
    inputs = make_inputs(groups, device, dtype=DTYPES[dtype])
    if memory == "permuted":
        inputs = [permuted(tensor) for tensor in inputs]
    arguments = settings(groups, device, dropout_p)
    out, lse = OP(*inputs, *arguments)
    torch.library.opcheck(OP_BACKWARD, (torch.randn_like(out), *inputs, out, lse, *arguments))
    torch.library.opcheck(OP, (*(tensor.requires_grad_() for tensor in inputs), *arguments))


@pytest.mark.parametrize("layout", WITH_AND_WITHOUT_DENOISING)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_to_one_graph(layout, dropout_p, device):
    groups = LAYOUTS[layout]
    inputs = [tensor.requires_grad_() for tensor in make_inputs(groups, device)]

    def loss(query, key, value):
        return grouped_attention(query, key, value, groups, dropout_p=dropout_p).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (loss, compiled):
        torch.manual_seed(7)
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_double_backward_is_refused(device):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(QueryGroups(2, 3), device)]
    out = grouped_attention(*inputs, 2)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("value_dim", [8, 5])
def test_autocast_does_not_lower_the_precision(value_dim, device):
    groups = LAYOUTS["denoising_first"]
    inputs = make_inputs(groups, device, value_dim=value_dim)
    arguments = settings(groups, device)
    expected, _ = OP(*inputs, *arguments)
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = OP(*inputs, *arguments)
    assert torch.equal(out, expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor that an op returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("layout", WITH_AND_WITHOUT_DENOISING)
@pytest.mark.parametrize(("value_dim", "dropout_p"), [(8, 0.0), (5, 0.0), (8, 0.1)])
def test_nothing_of_size_l_by_l_is_allocated(layout, value_dim, dropout_p, monkeypatch):
    sizes = {"groups": (10, 30), "denoising_first": (5, 30, 20, 8), "denoising_every": (5, 30, 4, 8, "every")}
    groups = QueryGroups(*sizes[layout])
    inputs = make_inputs(groups, batch=1, heads=1, value_dim=value_dim)
    arguments = settings(groups, "cpu", dropout_p)
    monkeypatch.setattr(cpu, "_BLOCK_ELEMENTS", 4096)
    largest_input = max(tensor.numel() for tensor in inputs)
    with LargestTensor() as kernel:  # the kernel's own function: modes do not look inside of an op
        out, lse = cpu.forward(*inputs, *arguments)
        cpu.backward(torch.ones_like(out), *inputs, out, lse, *arguments)
    with LargestTensor() as reference:
        grouped_attention_reference(*inputs, *arguments)
    assert reference.elements >= groups.length**2
    assert kernel.elements <= max(largest_input, 4096) < groups.length**2 / 10


def test_folding_copies_nothing():
    groups = QueryGroups(3, 4)
    query, _, _ = make_inputs(groups)
    part = cpu.group_part(groups)
    assert cpu._fold(query, part.count, part.row, part.rows).data_ptr() == query.data_ptr()


def test_thread_count():
    before = torch.get_num_threads()
    groups = QueryGroups(3, 50, 4, 6)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            for dropout_p, value_dim in ((0.0, 16), (0.2, 16), (0.0, 12)):
                inputs = make_inputs(groups, heads=4, dim=16, value_dim=value_dim)
                arguments = settings(groups, "cpu", dropout_p)
                out, lse = OP(*inputs, *arguments)
                results.append((out, lse, *OP_BACKWARD(torch.ones_like(out), *inputs, out, lse, *arguments)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(results[:3], results[3:], strict=True):
        for actual, expected in zip(two, one, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# Dropout


@pytest.mark.parametrize("layout", WITH_AND_WITHOUT_DENOISING)
def test_dropout_reaches_every_part_and_keeps_the_mean(layout, device):
    groups = LAYOUTS[layout]
    batch = 400
    query = torch.zeros(batch, groups.length, 1, 4, device=device)
    value = torch.ones(batch, groups.length, 1, 4, device=device)
    out = grouped_attention(query, query, value, groups, dropout_p=0.5)
    assert (out.std(dim=0) > 0.05).all()
    keys = groups.attention_mask(device).sum(dim=1)
    deviation = (1 / keys / batch).sqrt()[:, None, None]
    assert ((out.mean(dim=0) - 1).abs() < 5 * deviation).all()


def test_seed_comes_from_torchs_generator(device):
    inputs = make_inputs(QueryGroups(2, 20), device)
    torch.manual_seed(3)
    first, second = (grouped_attention(*inputs, 2, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(grouped_attention(*inputs, 2, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(grouped_attention(*inputs, 2), grouped_attention(*inputs, 2, dropout_p=0.0))
    assert torch.equal(torch.get_rng_state(), state)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 12, 16)}, ValueError, r"query must have shape \[B, L, H, D\], got \[2, 12, 16\]"),
        ({"query": torch.zeros(2, 12, 2, 8).int()}, TypeError, "query must be float32.* got torch.int32"),
        ({"key": torch.zeros(2, 12, 2, 7)}, ValueError, r"key must have the shape of query, .* got \[2, 12, 2, 7\]"),
        ({"key": torch.zeros(2, 12, 2, 8).half()}, TypeError, "key must have the dtype of query, .* got torch.float16"),
        (
            {"value": torch.zeros(2, 11, 2, 8)},
            ValueError,
            r"value must have shape \[2, 12, 2, Dv\], got \[2, 11, 2, 8\]",
        ),
        ({"value": torch.zeros(2, 12, 2, 8, device="meta")}, ValueError, "value must lie on the device of query, cpu"),
        ({"groups": 5}, ValueError, "groups must divide the number of queries, L = 12, got 5"),
        ({"groups": 3.0}, TypeError, "groups must be an integer or QueryGroups, got 3.0"),
        ({"groups": 0}, ValueError, "groups must divide the number of queries, L = 12, got 0"),
        ({"groups": QueryGroups(2, 5)}, ValueError, "groups must describe the L = 12 queries, got 10"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ],
)
def test_errors(change, error, message):
    query, key, value = make_inputs(QueryGroups(3, 4))
    with pytest.raises(error, match=message):
        grouped_attention(**{"query": query, "key": key, "value": value, "groups": 3, **change})


def test_no_queries():
    empty = torch.zeros(2, 0, 2, 8)
    with pytest.raises(ValueError, match="groups must divide the number of queries, L = 0"):
        grouped_attention(empty, empty, empty, 1)
