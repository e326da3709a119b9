"""FrozenBatchNorm2d against torchvision's."""

import copy

import pytest
import torch
import torchvision
from torch.autograd.graph import saved_tensors_hooks

from groupdetr_fast.layers.frozen_batch_norm import FrozenBatchNorm2d


@pytest.fixture
def norms():
    """Theirs and ours, with the same numbers."""
    generator = torch.Generator().manual_seed(0)
    theirs, ours = torchvision.ops.FrozenBatchNorm2d(6, eps=1e-3), FrozenBatchNorm2d(6, eps=1e-3)
    for name, buffer in theirs.named_buffers():
        buffer.uniform_(0.5, 1.5, generator=generator)
        getattr(ours, name).copy_(buffer)
    return theirs, ours


def make_map(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def test_equals_torchvision(norms):
    theirs, ours = (norm.double() for norm in norms)
    x = make_map()
    expected, actual = theirs(x), ours(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x.detach()), expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(x)
    (expected,), (actual,) = (torch.autograd.grad(out, x, grad) for out in (expected, actual))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, x)


def test_state_dicts_are_interchangeable(norms):
    theirs, ours = norms
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    copy.deepcopy(ours).load_state_dict(torch.nn.BatchNorm2d(6).state_dict())  # num_batches_tracked is left out


def test_half_maps_stay_so_and_keep_their_layout(norms):
    x = make_map(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (norm(x) for norm in norms)
    assert expected.dtype == torch.float32
    assert actual.dtype == torch.bfloat16
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual.float(), expected, rtol=2**-8, atol=2**-8)
    (grad,) = torch.autograd.grad(actual, x, torch.ones_like(actual))
    assert grad.dtype == torch.bfloat16
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_backward_keeps_no_map(norms):
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        norms[1](make_map(torch.float32))
    assert kept == [6, 6]


def test_compiles_whole_and_exports(norms):
    _, ours = norms
    x = make_map(torch.float32)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
    program = torch.export.export(ours.eval(), (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), ours(x))
