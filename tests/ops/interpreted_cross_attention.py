"""The Triton kernels of cross_attention against their reference; see test_triton_interpreted.py."""

import importlib.util
from pathlib import Path

import pytest
import torch

from groupdetr_fast.ops._dropout import keep_mask
from groupdetr_fast.ops.cross_attention import triton_kernels, triton_launch
from groupdetr_fast.ops.cross_attention.reference import (
    cross_attention_backward_reference,
    cross_attention_reference,
)
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory


def make_inputs(queries, keys, dim=16, value_dim=None, *, batch=1, heads=1, dtype=torch.float32, device="cpu"):
    shapes = (queries, dim), (keys, dim), (keys, value_dim or dim)
    return [torch.randn(batch, length, heads, size, dtype=torch.float64).to(device, dtype) for length, size in shapes]


def make_padding(batch, keys, width=None, device="cpu"):
    """Below and to the right of maps ``width`` wide, another rectangle in each image; without a width, anywhere."""
    if width is None:
        return (torch.rand(batch, keys) < 0.4).to(device)
    place = torch.arange(keys)
    row, column = place // width, place % width
    rows = torch.arange(batch)[:, None] + 1
    return ((row >= max(1, keys // width - 1) * rows / batch) | (column >= width - 2 * rows % 5)).to(device)


def settings(dropout_p=0.0, scale=0.3, seed=123456789012345, device="cpu"):
    return dropout_p, torch.tensor([seed], device=device) if dropout_p else None, scale


def run(inputs, padding, arguments, grad=None):
    """``out, lse, grad_query, grad_key, grad_value`` and the gradient of ``out`` that the last three are for."""
    with poisoned_memory():
        out, lse = triton_launch.forward(*inputs, padding, *arguments)
        grad = torch.randn_like(out) if grad is None else grad
        return out, lse, *triton_launch.backward(grad, *inputs, padding, out, lse, *arguments), grad


def check(inputs, padding, arguments, grad=None):
    out, lse, *grads, grad = run(inputs, padding, arguments, grad)
    reference = (*inputs, padding, *arguments)
    assert_matches_reference(out, lambda *args: cross_attention_reference(*args)[0], *reference)
    torch.testing.assert_close(lse, cross_attention_reference(*reference)[1])
    for index, actual in enumerate(grads):
        assert actual.is_contiguous()
        assert_matches_reference(
            actual,
            lambda *args, i=index: cross_attention_backward_reference(*args)[i],
            *(grad, *inputs, padding, out, lse, *arguments),
        )


@pytest.fixture(autouse=True)
def forget():
    """A function that lets launches be made anew; it is called around every test, too."""

    def forget_launches():
        triton_launch._forward_launches.cache_clear()
        triton_launch._backward_launches.cache_clear()

    forget_launches()
    yield forget_launches
    forget_launches()


@pytest.fixture
def short_chunks(monkeypatch):
    """Queries are cut into chunks though they are few."""
    monkeypatch.setattr(triton_launch, "_QUERIES_PER_CHUNK", 32)


@pytest.mark.parametrize(
    ("queries", "keys", "dims", "width", "dtype", "dropout_p"),
    [
        (1, 2, (16, 16), None, torch.float32, 0.0),
        (15, 17, (16, 16), None, torch.float32, 0.3),
        (33, 65, (64, 32), 9, torch.float16, 0.1),
        (65, 64, (64, 32), None, torch.float32, 0.3),
        (70, 130, (32, 24), 13, torch.float16, 0.0),
        (64, 33, (1, 3), 5, torch.float32, 0.3),
        (17, 40, (24, 100), 8, torch.float32, 0.0),
        (20, 70, (128, 128), 10, torch.float16, 0.2),
        (40, 35, (100, 32), 7, torch.float32, 0.2),
    ],
    ids=str,
)
def test_matches_reference(queries, keys, dims, width, dtype, dropout_p, short_chunks):
    inputs = make_inputs(queries, keys, *dims, batch=2, dtype=dtype)
    padding = make_padding(2, keys, width)
    assert padding.any()
    check(inputs, padding, settings(dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_without_padding(dropout_p, short_chunks):
    inputs = make_inputs(40, 70, 32, 16, heads=2)
    check(inputs, None, settings(dropout_p))
    *expected, grad = run(inputs, None, settings(dropout_p))
    *actual, _ = run(inputs, torch.zeros(1, 70, dtype=torch.bool), settings(dropout_p), grad)
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "dims", "dtype", "dropout_p"),
    [(3300, (64, 32), torch.float16, 0.1), (1050, (32, 32), torch.float32, 0.1), (900, (64, 32), torch.float32, 0.0)],
    ids=str,
)
def test_at_length(queries, dims, dtype, dropout_p):
    check(make_inputs(queries, 1050, *dims, dtype=dtype), make_padding(1, 1050, 42), settings(dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_images_that_are_all_padding(dropout_p, short_chunks):
    inputs = make_inputs(40, 40, batch=3)
    padding = make_padding(3, 40, 10)
    padding[1] = True
    check(inputs, padding, settings(dropout_p))
    out, lse, *grads, _ = run(inputs, padding, settings(dropout_p))
    assert all((tensor[1] == 0).all() for tensor in (out, lse, *grads))


def sequence_first(tensors):
    return [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]


def channels_outermost(tensors):
    return [tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for tensor in tensors]


def surrounded_by_nan(tensors):
    """Views into larger tensors of NaN, which show where more is read than there is."""
    wider = [torch.nn.functional.pad(tensor, (3, 2, 1, 2, 2, 1, 1, 1), value=float("nan")) for tensor in tensors]
    return [tensor[1:-1, 2:-1, 1:-2, 3:-2] for tensor in wider]


@pytest.mark.parametrize(
    "view", [sequence_first, channels_outermost, surrounded_by_nan], ids=lambda view: view.__name__
)
def test_strides(view):
    inputs = make_inputs(20, 33, 20, 12, batch=2, heads=2)
    padding, arguments = make_padding(2, 33), settings(0.3)
    *expected, grad = run(inputs, padding, arguments)
    *views, grad_view = view([*inputs, grad])
    assert not views[0].is_contiguous()
    wide = torch.ones(33, 4, dtype=torch.bool)
    wide[:, ::2] = padding.t()
    *actual, _ = run(views, wide[:, ::2].t(), arguments, grad_view)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert tensor.is_contiguous()
        assert torch.equal(tensor, wanted)


def test_expanded_gradient():
    """The gradient of a sum is one number, with strides of 0."""
    check(make_inputs(20, 33), make_padding(1, 33), settings(), torch.ones(()).expand(1, 20, 1, 16))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_padding_is_not_read(dropout_p):
    """It can be NaN."""
    inputs, padding = make_inputs(40, 70, batch=2), make_padding(2, 70, 10)
    *expected, grad = run(inputs, padding, settings(dropout_p))
    hidden = [tensor.masked_fill(padding[..., None, None], float("nan")) for tensor in inputs[1:]]
    *actual, _ = run([inputs[0], *hidden], padding, settings(dropout_p), grad)
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("dropout_p", "seed"), [(0.3, 123456789012345), (0.5, 2**63 - 1), (0.75, -5), (0.999, 2**32)])
def test_dropout_keeps_what_its_definition_keeps(dropout_p, seed, short_chunks):
    queries, keys, heads = 33, 35, 2
    query = torch.zeros(2, queries, heads, 16)
    unit_values = torch.eye(keys)[None, :, None].expand(2, keys, heads, keys)
    padding, arguments = make_padding(2, keys), settings(dropout_p, seed=seed)
    grad = torch.ones(2, queries, heads, keys)
    inputs = query, torch.zeros(2, keys, heads, 16), unit_values
    out, *_ = run(inputs, padding, arguments, grad)
    head, row = torch.arange(2 * heads).view(2, 1, heads, 1), torch.arange(queries)[:, None, None]
    column = ((~padding).cumsum(1) - 1)[:, None, None]
    keep = keep_mask(arguments[1], dropout_p, head, row, column) & ~padding[:, None, None]  # [B, L, H, S]
    assert torch.equal(out > 0, keep)
    # A channel for each query, in turn: the gradient of values shows what backward keeps.
    narrow = unit_values[..., :queries]
    *_, grad_value, _ = run(
        (*inputs[:2], narrow), padding, arguments, torch.eye(queries)[None, :, None].expand(2, -1, heads, -1)
    )
    assert torch.equal(grad_value > 0, keep.transpose(1, 3))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_scores(dtype, sign):
    """Scores near 1000, all of one sign: their exponentials overflow, or vanish."""
    query, key, value = make_inputs(20, 40, dtype=dtype)
    query, key, padding = query.abs(), sign * (key.abs() + 4), make_padding(1, 40)
    arguments = settings(scale=8.0)
    out, lse, *grads, grad = run((query, key, value), padding, arguments)
    assert lse.abs().min() > 300
    exact = [tensor.double() for tensor in (query, key, value)]
    expected = cross_attention_reference(*exact, padding, *arguments)[0]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)
    references = cross_attention_backward_reference(grad.double(), *exact, padding, out, lse, *arguments)
    # From each score's gradient, the sum of out * grad over channels is subtracted, with out as it was stored; where
    # gradients nearly cancel, its rounding is what is left of them.
    rounding = torch.finfo(dtype).eps / 2 * (out.double() * grad.double()).abs().sum(-1, keepdim=True)
    of_query = arguments[2] * rounding * exact[1].abs().max()
    for actual, expected, allowed in zip(grads, references, (of_query, 0, 0), strict=True):
        assert ((actual.double() - expected).abs() <= 5e-3 * expected.abs().max() + allowed).all()


@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0}, {"queries": 0}, {"keys": 0}])
@pytest.mark.parametrize("padded", [False, True])
def test_empty(change, padded):
    inputs = make_inputs(**{"queries": 5, "keys": 6, **change})
    padding = torch.zeros(inputs[1].shape[:2], dtype=torch.bool) if padded else None
    out, lse, *grads, _ = run(inputs, padding, settings(0.5))
    assert out.shape == (*inputs[0].shape[:3], 16)
    assert (out == 0).all() or inputs[1].numel() > 0
    assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    ("dims", "dtype", "scale"),
    [
        ((16, 16), torch.float64, 0.3),
        ((129, 16), torch.float32, 0.3),
        ((16, 200), torch.float16, 0.3),
        ((0, 16), torch.float32, 0.3),
        ((16, 16), torch.float32, -0.3),
    ],
)
def test_reference_runs_what_the_kernels_do_not_cover(dims, dtype, scale):
    query, key = (torch.randn(1, length, 2, dims[0]).to(dtype) for length in (5, 6))
    inputs, padding = (query, key, torch.randn(1, 6, 2, dims[1]).to(dtype)), make_padding(1, 6)
    arguments = settings(0.2, scale)
    out, lse, *grads, grad = run(inputs, padding, arguments)
    for actual, expected in zip((out, lse), cross_attention_reference(*inputs, padding, *arguments), strict=True):
        assert torch.equal(actual, expected)
    references = cross_attention_backward_reference(grad, *inputs, padding, out, lse, *arguments)
    assert all(torch.equal(actual, expected) for actual, expected in zip(grads, references, strict=True))


@pytest.mark.parametrize(("precision", "dim"), [("tf32", 32), ("tf32", 64), ("tf32", 128), ("ieee", 128)])
def test_tiles_of_other_precisions(precision, dim, monkeypatch):
    """The interpreter computes products in float32 whatever the precision."""
    monkeypatch.setattr(triton_launch, "precision_of", lambda *_: precision)
    check(make_inputs(70, 50, dim), make_padding(1, 50, 8), settings())


FAULTS = {
    "repeated keys count": ("if left < STEP:", "if left < 0:"),
    "no rescaling": ("total = total * correction +", "total = total +"),
    "columns of dropout start anew": (
        "points = dropout_points(head_word0, places)",
        "points = dropout_points(0, places)",
    ),
    "sums of the other gradient": (
        "_add_up(value_total, value_parts, value_size,",
        "_add_up(value_total, key_parts, value_size,",
    ),
    "not all keys are summed": (
        "_add_up(key_total, key_parts, key_size,",
        "_add_up(key_total, key_parts, value_size,",
    ),
    "padding is counted": ("order + image * (keys + 1) + keys, count)", "order + image * (keys + 1) + keys, keys)"),
    "a chunk too short": ("tl.minimum(start + queries_per_chunk, queries), start)", "start + 32, start)"),
    "chunks start alike": ("start = tl.program_id(1) * queries_per_chunk", "start = tl.program_id(1) * 0"),
    "padding gets gradients": ("visible = (places < count)[:, None]", "visible = (places < keys)[:, None]"),
    "delta of keys beyond the end": ("row_delta[:, None] * is_key[None, :]", "row_delta[:, None]"),
    "no keys, no zeros": ("tl.where(count > 0, total, 1.0)", "total"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path, monkeypatch, short_chunks, forget):
    right, wrong = FAULTS[fault]
    source = Path(triton_kernels.__file__).read_text()
    assert right in source
    path = tmp_path / "faulty_kernels.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"{triton_kernels.__package__}.faulty_kernels", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    padding = make_padding(2, 56, 8)
    padding[1] = fault == "no keys, no zeros"
    inputs = make_inputs(40, 56, 32, 16, batch=2)
    check(inputs, padding, settings(0.3))
    names = [name for name in vars(triton_launch) if name.endswith("_kernel") and hasattr(faulty, name)]
    kernels = {getattr(triton_launch, name): getattr(faulty, name) for name in names}
    tiles = {kernels[kernel]: tiles for kernel, tiles in triton_launch._TILES.items()}
    for name, kernel in zip(names, kernels.values(), strict=True):
        monkeypatch.setattr(triton_launch, name, kernel)
    monkeypatch.setattr(triton_launch, "_TILES", tiles)
    forget()
    with pytest.raises(AssertionError):
        check(inputs, padding, settings(0.3))
