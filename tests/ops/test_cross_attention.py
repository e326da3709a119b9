import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast._library import has_kernel
from groupdetr_fast.layers import attention as layer
from groupdetr_fast.ops import cross_attention
from groupdetr_fast.ops.cross_attention import cpu, is_preferred, op
from groupdetr_fast.ops.cross_attention.decomposition import attend_by_products
from groupdetr_fast.ops.cross_attention.reference import (
    cross_attention_backward_reference,
    cross_attention_reference,
)
from groupdetr_fast.ops.grouped_attention import cpu as blocks
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

OP = torch.ops.groupdetr_fast.cross_attention
OP_BACKWARD = torch.ops.groupdetr_fast.cross_attention_backward

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PADDINGS = ("none", "nothing", "end", "map", "holes", "one image", "one key", "all")
IMAGES, KEYS = 3, 12  # a map of 3 x 4


def make_padding(kind, device="cpu"):
    """``[3, 12]``, or None."""
    if kind == "none":
        return None
    maps = torch.zeros(IMAGES, 3, 4, dtype=torch.bool)
    if kind == "end":
        maps[1, 2:] = True
    elif kind == "map":
        maps[0, 2:], maps[1, :, 3:], maps[2, 1:], maps[2, :, 2:] = True, True, True, True
    elif kind == "holes":
        maps = torch.rand(maps.shape) < 0.5
        maps[:, 0, 0], maps[:, 0, 1] = True, False
    elif kind == "one image":
        maps[1] = True
    elif kind == "one key":
        maps[:] = True
        maps[:, 1, 2] = False
    elif kind == "all":
        maps[:] = True
    return maps.flatten(1).to(device)


def make_inputs(device="cpu", *, batch=IMAGES, queries=7, keys=KEYS, heads=2, dim=8, value_dim=5, dtype=torch.float32):
    shapes = (batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, value_dim)
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def settings(device, dropout_p=0.0, scale=0.3):
    return dropout_p, torch.tensor([123456789012345], device=device) if dropout_p else None, scale


def masked_sdpa(query, key, value, padding, scale=None):
    """torch's attention under an explicit mask, [B, L, H, Dv]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = None if padding is None else ~padding[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("value_dim", [8, 5, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(kind, dropout_p, value_dim, dtype, device):
    inputs = [*make_inputs(device, value_dim=value_dim, dtype=DTYPES[dtype]), make_padding(kind, device)]
    arguments = settings(device, dropout_p)
    with poisoned_memory():
        out, lse = OP(*inputs, *arguments)
        grad = torch.randn_like(out)
        grads = OP_BACKWARD(grad, *inputs, out, lse, *arguments)
    assert_matches_reference(out, lambda *args: cross_attention_reference(*args)[0], *inputs, *arguments)
    # torch's kernel for half types takes exponentials to 20 bits; these are still far below the result's own precision.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if inputs[0].dtype.itemsize == 2 else {}
    torch.testing.assert_close(lse, cross_attention_reference(*inputs, *arguments)[1], **tolerance)
    for index, actual in enumerate(grads):
        if kind == "one key" and index < 2:
            # One key has probability 1 whatever its score: the exact gradient is 0, a difference of equal numbers.
            assert actual.abs().max() <= 16 * torch.finfo(actual.dtype).eps
            continue
        assert_matches_reference(
            actual,
            lambda *args, i=index: cross_attention_backward_reference(*args)[i],
            *(grad, *inputs, out, lse, *arguments),
        )


@pytest.mark.parametrize("kind", PADDINGS)
def test_equals_masked_sdpa(kind, device):
    padding = make_padding(kind, device)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device, dtype=torch.float64)]
    expected = masked_sdpa(*inputs, padding)
    out = cross_attention(*inputs, padding)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("value_dim", [3, 2])
@pytest.mark.parametrize("kind", ["none", "map", "one image"])
def test_gradcheck(kind, value_dim, dropout_p, device):
    inputs = make_inputs(device, queries=2, heads=1, dim=3, value_dim=value_dim, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    padding, arguments = make_padding(kind, device), settings(device, dropout_p)
    assert torch.autograd.gradcheck(lambda *tensors: OP(*tensors, padding, *arguments)[0], inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_images_that_are_all_padding_give_zeros(dropout_p, device):
    padding = make_padding("one image", device)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device)]
    out = cross_attention(*inputs, padding, dropout_p=dropout_p)
    assert (out[1] == 0).all()
    assert (out[[0, 2]] != 0).any()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert (grad[1] == 0).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["end", "map", "holes"])
def test_padding_changes_nothing(kind, dropout_p, device):
    """Neither what it holds nor where it is: an image gives the same without it, also with dropout."""
    padding = make_padding(kind, device)
    query, key, value = make_inputs(device)
    arguments = settings(device, dropout_p)
    out, _ = OP(query, key, value, padding, *arguments)
    loud_key, loud_value = (tensor.masked_fill(padding[..., None, None], 1e4) for tensor in (key, value))
    torch.testing.assert_close(OP(query, loud_key, loud_value, padding, *arguments)[0], out)
    # Alone, the first image without its padding has the heads, rows and columns that it has here.
    visible = ~padding[0]
    alone, _ = OP(query[:1], key[:1, visible], value[:1, visible], None, *arguments)
    torch.testing.assert_close(out[:1], alone)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_images_and_padding_never_leak(dropout_p, device):
    padding = make_padding("map", device)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device)]
    out, _ = OP(*inputs, padding, *settings(device, dropout_p))
    grads = torch.autograd.grad(out[1, 2].sum(), inputs)
    for grad in grads:
        assert (grad[[0, 2]] == 0).all()
    others = torch.arange(out.shape[1], device=device) != 2
    assert (grads[0][1, others] == 0).all()
    for grad in grads[1:]:
        assert (grad[1, padding[1]] == 0).all()
        assert dropout_p > 0 or (grad[1, ~padding[1]] != 0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_blocks_of_rows_and_of_problems(dropout_p, device, monkeypatch):
    """The explicit path, cut into blocks so small that every kind of cut occurs, gives the same numbers."""
    inputs = [*make_inputs(device, value_dim=11, dtype=torch.float64), make_padding("map", device)]
    arguments = settings(device, dropout_p)
    grad = torch.randn(IMAGES, 7, 2, 11, dtype=torch.float64, device=device)
    results = []
    for elements in (1, 50, 200, 1 << 20):
        monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", elements)
        out, lse = OP(*inputs, *arguments)
        results.append((out, lse, *OP_BACKWARD(grad, *inputs, out, lse, *arguments)))
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(actual, expected)


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


@pytest.mark.parametrize(("value_dim", "dropout_p"), [(8, 0.0), (5, 0.0), (8, 0.1)])
def test_nothing_of_size_l_by_s_is_allocated(value_dim, dropout_p, monkeypatch):
    inputs = [*make_inputs(batch=1, queries=300, keys=200, heads=1, value_dim=value_dim), torch.zeros(1, 200).bool()]
    inputs[3][:, 150:] = True
    arguments = settings("cpu", dropout_p)
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 2048)
    with LargestTensor() as kernel:  # the kernel's own function: modes do not look inside of an op
        out, lse = cpu.forward(*inputs, *arguments)
        cpu.backward(torch.ones_like(out), *inputs, out, lse, *arguments)
    assert kernel.elements <= 2400 < 300 * 150 / 10  # those of the largest input


@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0}, {"queries": 0}, {"keys": 0}])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("padded", [False, True])
def test_empty_sizes(change, dropout_p, padded, device):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device, **change)]
    padding = torch.zeros(inputs[1].shape[:2], dtype=torch.bool, device=device)
    padding[:, :1] = True
    out = cross_attention(*inputs, padding if padded else None, dropout_p=dropout_p)
    assert out.shape == (*inputs[0].shape[:3], 5)
    assert (out == 0).all() or inputs[1].numel() > 0
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


def test_zero_channels(device):
    query, key, value = make_inputs(device, dim=0)
    mean = value.mean(1, keepdim=True).expand(-1, 7, -1, -1)
    torch.testing.assert_close(cross_attention(query, key, value), mean)
    query, key, value = make_inputs(device, value_dim=0)
    assert cross_attention(query, key, value).shape == (IMAGES, 7, 2, 0)


def permuted(tensor):
    """The same numbers, dense, in another order in memory."""
    return tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layout_does_not_matter(value_dim, dropout_p, device):
    inputs, padding = make_inputs(device, value_dim=value_dim), make_padding("map", device)
    arguments = settings(device, dropout_p)
    out, lse = OP(*inputs, padding, *arguments)
    grad = torch.randn_like(out)
    grads = OP_BACKWARD(grad, *inputs, padding, out, lse, *arguments)
    sequence_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    turned = padding.t().contiguous().t()
    for others in ([permuted(tensor) for tensor in inputs], sequence_first):
        assert not others[0].is_contiguous()
        other_out, other_lse = OP(*others, turned, *arguments)
        other_grads = OP_BACKWARD(permuted(grad), *others, turned, permuted(out), lse, *arguments)
        for actual, expected in zip((other_out, other_lse, *other_grads), (out, lse, *grads), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.is_contiguous()
    expanded = torch.ones(1, 1, 1, 1, device=device).expand(out.shape)
    for actual, expected in zip(
        OP_BACKWARD(expanded, *inputs, padding, out, lse, *arguments),
        OP_BACKWARD(expanded.contiguous(), *inputs, padding, out, lse, *arguments),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("memory", ["contiguous", "permuted"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "dtype"), [("none", "float32"), ("map", "bfloat16")])
def test_opcheck(memory, dropout_p, kind, dtype, device):
    inputs, padding = make_inputs(device, dtype=DTYPES[dtype]), make_padding(kind, device)
    if memory == "permuted":
        inputs = [permuted(tensor) for tensor in inputs]
    arguments = settings(device, dropout_p)
    out, lse = OP(*inputs, padding, *arguments)
    torch.library.opcheck(OP_BACKWARD, (torch.randn_like(out), *inputs, padding, out, lse, *arguments))
    torch.library.opcheck(OP, (*(tensor.requires_grad_() for tensor in inputs), padding, *arguments))


@pytest.mark.parametrize("kind", ["none", "map"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_to_one_graph(kind, dropout_p, device):
    padding = make_padding(kind, device)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device)]

    def loss(query, key, value):
        return cross_attention(query, key, value, padding, dropout_p=dropout_p).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (loss, compiled):
        torch.manual_seed(7)
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_double_backward_is_refused(device):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device)]
    out = cross_attention(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("value_dim", [8, 5])
def test_autocast_does_not_lower_the_precision(value_dim, device):
    inputs = [*make_inputs(device, value_dim=value_dim), make_padding("map", device)]
    expected, _ = OP(*inputs, *settings(device))
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = OP(*inputs, *settings(device))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", PADDINGS)
def test_decomposition_is_the_op(kind):
    inputs = [*make_inputs(), make_padding(kind)]
    out, _ = attend_by_products(*inputs, *settings("cpu"))
    torch.testing.assert_close(out, cross_attention_reference(*inputs, *settings("cpu"))[0])


@pytest.mark.parametrize("kind", ["none", "map"])
def test_layers_use_it_where_it_is_preferred(kind, monkeypatch):
    """As torch's attention they give the same, and what a GPU would run is what is compared here."""
    query, key, value = (tensor.requires_grad_() for tensor in make_inputs())
    results, calls = [], []
    for preferred in (False, True):
        monkeypatch.setattr(layer, "is_preferred", lambda *_, preferred=preferred: preferred)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = layer.attend(query, key, value, make_padding(kind), 0.0)
        calls.append({event.key for event in profile.key_averages()})
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    assert ["groupdetr_fast::cross_attention" in names for names in calls] == [False, True]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


class Operators(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_are_traced_for_a_gpu(dtype):
    pytest.importorskip("triton")
    with FakeTensorMode(), Operators() as called:  # whose backward pass would need a GPU
        query, key, value = (tensor.to(dtype) for tensor in make_inputs("cuda"))
        out = layer.attend(query.requires_grad_(), key, value, make_padding("map").cuda(), 0.1)
    assert (out.shape, out.dtype, out.device.type) == ((IMAGES, 7, 2 * 5), dtype, "cuda")
    assert out.requires_grad
    assert ("groupdetr_fast::cross_attention" in called.names) is (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("device_type", "dtype", "dims", "dropout_p", "preferred"),
    [
        ("cuda", torch.bfloat16, (64, 32), 0.0, True),
        ("cuda", torch.float16, (128, 128), 0.1, True),
        ("cuda", torch.bfloat16, (256, 128), 0.0, False),  # heads so wide run on the reference
        ("cuda", torch.bfloat16, (64, 256), 0.0, False),
        ("cuda", torch.float32, (64, 32), 0.1, False),
        ("cpu", torch.bfloat16, (64, 32), 0.0, False),
        ("mps", torch.float16, (64, 32), 0.1, False),
    ],
)
def test_preferred_on_tensor_cores_under_a_mask(device_type, dtype, dims, dropout_p, preferred, monkeypatch):
    pytest.importorskip("triton")
    query, value = (
        SimpleNamespace(device=torch.device(device_type), dtype=dtype, shape=(2, 9, 8, dim)) for dim in dims
    )
    monkeypatch.setattr(op, "_serves", lambda device: True)
    for wanted in (True, False):
        monkeypatch.setattr(op, "_WANTED", wanted)
        assert is_preferred(query, value, make_padding("map"), dropout_p) is (wanted and preferred)
        assert not is_preferred(query, value, None, dropout_p)


@pytest.mark.skipif(not has_kernel("attention_dropout", "CPU"), reason="there are no compiled kernels")
@pytest.mark.parametrize("kind", ["none", "map"])
@pytest.mark.parametrize("wanted", [True, False])
def test_preferred_on_cpus_with_dropout(kind, wanted, monkeypatch):
    monkeypatch.setattr(op, "_WANTED", wanted)
    query, key, value = make_inputs()
    for dropout_p in (0.0, 0.1):
        assert is_preferred(query, value, make_padding(kind), dropout_p) is (wanted and dropout_p > 0)
        with Operators() as called:
            layer.attend(query, key, value, make_padding(kind), dropout_p)
        assert ("groupdetr_fast::cross_attention" in called.names) is (wanted and dropout_p > 0)


def test_the_environment_turns_it_off_in_layers():
    code = "from groupdetr_fast.ops.cross_attention import op; print(op._WANTED)"
    for value, wanted in (("0", "False"), ("1", "True")):
        environment = {**os.environ, "GROUPDETR_FAST_CROSS_ATTENTION": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


def test_compiled_layers_know_at_once_whether_a_gpu_serves(monkeypatch):
    """What a GPU is asked cannot be traced, as little as what time it is."""
    asked = []
    monkeypatch.setattr(op, "_asked_once", lambda device: not asked.append((device, time.monotonic())))
    compiled = torch.compile(lambda x: 2 * x if op._serves(x.device) else x, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert [device for device, _ in asked] == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(3, 7, 2, 8).int()}, TypeError, "query must be float32, float64, float16 or bfloat16"),
        ({"query": torch.zeros(3, 7, 16)}, ValueError, r"query must have shape \[B, L, H, D\], got \[3, 7, 16\]"),
        ({"key": torch.zeros(3, 12, 2, 8).half()}, TypeError, "key must have the dtype of query, torch.float32"),
        ({"key": torch.zeros(3, 12, 2, 7)}, ValueError, r"key must have shape \[3, S, 2, 8\], got \[3, 12, 2, 7\]"),
        ({"key": torch.zeros(2, 12, 2, 8)}, ValueError, r"key must have shape \[3, S, 2, 8\], got \[2, 12, 2, 8\]"),
        (
            {"value": torch.zeros(3, 11, 2, 5)},
            ValueError,
            r"value must have shape \[3, 12, 2, Dv\], got \[3, 11, 2, 5\]",
        ),
        ({"value": torch.zeros(3, 12, 2, 5, device="meta")}, ValueError, "value must lie on the device of query, cpu"),
        ({"padding": torch.zeros(3, 12)}, TypeError, "padding must be bool, True on padding, got torch.float32"),
        ({"padding": torch.zeros(3, 11).bool()}, ValueError, r"padding must have shape \[3, 12\], got \[3, 11\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ],
)
def test_errors(change, error, message):
    query, key, value = make_inputs()
    with pytest.raises(error, match=message):
        cross_attention(**{"query": query, "key": key, "value": value, **change})
