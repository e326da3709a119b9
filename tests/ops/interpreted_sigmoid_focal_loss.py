"""The Triton kernels of sigmoid_focal_loss against its reference; see test_triton_interpreted.py."""

import pytest
import torch

from groupdetr_fast.ops.sigmoid_focal_loss import triton_kernels
from groupdetr_fast.ops.sigmoid_focal_loss.reference import (
    IGNORED,
    NO_OBJECT,
    sigmoid_focal_loss_backward_reference,
    sigmoid_focal_loss_reference,
)
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

DEFAULTS = (0.25, 2.0)  # alpha, gamma
NAN = float("nan")


def make_inputs(leading=(2, 3), queries=20, classes=7, dtype=torch.float32):
    logits = (torch.randn(*leading, queries, classes) * 3).to(dtype)
    return logits, torch.randint(IGNORED, classes, (*leading, queries))


def run(logits, targets, alpha=0.25, gamma=2.0):
    """Loss, and gradient for an upstream gradient that differs from image to image."""
    loss = triton_kernels.forward(logits, targets, alpha, gamma)
    upstream = torch.linspace(1, 2, loss.numel()).view(loss.shape).to(loss.dtype)
    return loss, triton_kernels.backward(upstream, logits, targets, alpha, gamma)


def check(logits, targets, alpha=0.25, gamma=2.0):
    with poisoned_memory():
        loss = triton_kernels.forward(logits, targets, alpha, gamma)
        upstream = torch.randn_like(loss)
        grad = triton_kernels.backward(upstream, logits, targets, alpha, gamma)
    assert grad.is_contiguous()
    assert_matches_reference(loss, sigmoid_focal_loss_reference, logits, targets, alpha, gamma)
    assert_matches_reference(grad, sigmoid_focal_loss_backward_reference, upstream, logits, targets, alpha, gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("alpha", "gamma"), [DEFAULTS, (0.6, 1.5), (0.0, 0.0)])
def test_matches_reference(dtype, alpha, gamma):
    check(*make_inputs(dtype=dtype), alpha, gamma)


@pytest.mark.parametrize("classes", [1, 2, 3, 31, 32, 33, 91])
@pytest.mark.parametrize("queries", [1, 31, 32, 33])
def test_block_edges(queries, classes):
    check(*make_inputs((2,), queries, classes))


def test_one_image_without_leading_dimensions():
    check(*make_inputs((), 1025, 1))


@pytest.mark.parametrize("shape", [(2, 3, 0, 7), (2, 3, 20, 0), (2, 0, 20, 7)])
def test_empty_sizes(shape):
    logits, targets = torch.zeros(shape), torch.full(shape[:-1], NO_OBJECT)
    loss, grad = run(logits, targets)
    assert torch.equal(loss, torch.zeros(shape[:-2]))
    assert grad.shape == shape


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 5:],
        lambda x: x.flip(2)[:, :, ::2],
        lambda x: x.transpose(2, -1).contiguous().transpose(2, -1),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(4, *x.shape[1:]),
    ],
    ids=["after denoising queries", "every other query", "class-major", "image-major", "expanded"],
)
def test_layout_does_not_matter(view):
    logits, targets = make_inputs(queries=37)
    logits, targets = view(logits), view(targets.unsqueeze(-1).expand(-1, -1, -1, 2))[..., 0]
    expected = run(logits.contiguous(), targets.contiguous())
    for actual, same in zip(run(logits, targets), expected, strict=True):
        assert torch.equal(actual, same)
    upstream = torch.ones(()).expand(expected[0].shape)
    assert torch.equal(
        triton_kernels.backward(upstream, logits, targets, *DEFAULTS),
        triton_kernels.backward(upstream.contiguous(), logits, targets, *DEFAULTS),
    )


@pytest.mark.parametrize("target", [7, -3, 2**62, -(2**63)])
def test_an_unknown_class_is_not_a_number(target):
    logits, targets = make_inputs()
    targets[1, 2, 5] = target
    loss, grad = run(logits, targets)
    assert loss.isnan().nonzero().tolist() == [[1, 2]]
    expected = torch.zeros_like(grad, dtype=torch.bool)
    expected[1, 2, 5] = True
    assert torch.equal(grad.isnan(), expected)


def test_not_a_number_stays_in_its_place_and_out_of_ignored_rows():
    logits, targets = make_inputs()
    targets[0, 1, 4], targets[0, 2, 5], targets[1, 1, 6] = 3, NO_OBJECT, IGNORED
    clean_loss, clean_grad = run(logits, targets)
    bad = torch.zeros_like(logits, dtype=torch.bool)
    bad[0, 1, 4, 3] = bad[0, 2, 5, 0] = True
    logits = logits.masked_fill(bad, NAN)
    logits[1, 1, 6] = NAN
    loss, grad = run(logits, targets)
    assert loss.isnan().nonzero().tolist() == [[0, 1], [0, 2]]
    assert torch.equal(loss[1], clean_loss[1])
    assert torch.equal(grad.isnan(), bad)
    assert torch.equal(grad[~bad], clean_grad[~bad])
    assert (grad[1, 1, 6] == 0).all()


def test_extreme_logits_are_exact():
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4]).expand(2, 4).reshape(2, 4, 1, 1)
    targets = torch.tensor([0, NO_OBJECT]).view(2, 1, 1).expand(2, 4, 1)
    loss = triton_kernels.forward(logits, targets, *DEFAULTS)
    grad = triton_kernels.backward(torch.ones_like(loss), logits, targets, *DEFAULTS).view(2, 4)
    torch.testing.assert_close(loss, torch.tensor([[2500.0, 50, 0, 0], [0, 0, 150, 7500]]), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(grad, torch.tensor([[-0.25, -0.25, 0, 0], [0, 0, 0.75, 0.75]]), rtol=1e-6, atol=1e-30)
