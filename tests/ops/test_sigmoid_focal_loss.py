"""sigmoid_focal_loss against torchvision's, gradcheck, and its reference."""

import os
import subprocess
import sys

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

from groupdetr_fast import ops
from groupdetr_fast.ops.sigmoid_focal_loss.reference import (
    sigmoid_focal_loss_backward_reference,
    sigmoid_focal_loss_reference,
)
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

OP = torch.ops.groupdetr_fast.sigmoid_focal_loss.default
OP_BACKWARD = torch.ops.groupdetr_fast.sigmoid_focal_loss_backward.default
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PARAMETERS = [(0.25, 2.0), (0.6, 1.5), (0.0, 0.0), (1.0, 3.0)]  # alpha, gamma
NAN, INF = float("nan"), float("inf")
NO_OBJECT, IGNORED = -1, -2


def make_inputs(device="cpu", leading=(2, 3), queries=20, classes=7, dtype=torch.float32):
    """Logits, and target classes in which the other two values occur too."""
    logits = torch.randn(*leading, queries, classes, dtype=torch.float64) * 3
    targets = torch.randint(IGNORED, classes, (*leading, queries))
    return logits.to(device, dtype), targets.to(device)


def torchvision_loss(logits, targets, alpha, gamma):
    """In float64, [..., Q, C]; rows that are ignored are 0."""
    present = torch.zeros_like(logits, dtype=torch.float64)
    for index in (targets >= 0).nonzero().tolist():
        present[(*index, targets[tuple(index)])] = 1
    loss = torchvision.ops.sigmoid_focal_loss(logits.double(), present, alpha, gamma)
    return loss * (targets != IGNORED).unsqueeze(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("alpha", "gamma"), PARAMETERS)
def test_equals_torchvision(device, dtype, alpha, gamma):
    logits, targets = make_inputs(device, queries=100, classes=91, dtype=dtype)
    double = logits.double().requires_grad_()
    expected = torchvision_loss(double, targets, alpha, gamma).sum((-2, -1))
    loss = ops.sigmoid_focal_loss(logits.requires_grad_(), targets, alpha=alpha, gamma=gamma)
    tolerance = 1e-6 if dtype != torch.float64 else 1e-13
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    upstream = torch.rand_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    (expected_grad,) = torch.autograd.grad(expected, double, upstream.double())
    relative = max(8 * tolerance, torch.finfo(dtype).eps)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=relative, atol=tolerance)


CASES = {
    "plain": {},
    "one_of_everything": {"leading": (), "queries": 1, "classes": 1},
    "one_class": {"queries": 33, "classes": 1},
    "one_query": {"leading": (5,), "queries": 1, "classes": 91},
    "coco": {"leading": (2,), "queries": 301, "classes": 91},
    "lanes_and_one": {"queries": 65, "classes": 17},
    "three_leading": {"leading": (2, 1, 3)},
    "longer_than_a_block": {"leading": (2,), "queries": 3, "classes": 5001},
}
EMPTY = {
    "no_queries": {"queries": 0},
    "no_classes": {"classes": 0},
    "no_images": {"leading": (2, 0)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("alpha", "gamma"), PARAMETERS[:3])
def test_matches_reference(device, case, dtype, alpha, gamma):
    logits, targets = make_inputs(device, **CASES[case], dtype=dtype)
    with poisoned_memory():
        loss = OP(logits, targets, alpha, gamma)
        upstream = torch.randn_like(loss)
        grad = OP_BACKWARD(upstream, logits, targets, alpha, gamma)
    assert_matches_reference(loss, sigmoid_focal_loss_reference, logits, targets, alpha, gamma)
    assert_matches_reference(grad, sigmoid_focal_loss_backward_reference, upstream, logits, targets, alpha, gamma)


@pytest.mark.parametrize("case", EMPTY)
def test_empty_sizes(device, case):
    logits, targets = make_inputs(device, **{"classes": 7, **EMPTY[case]})
    with poisoned_memory():
        loss = ops.sigmoid_focal_loss(logits.requires_grad_(), targets)
    assert torch.equal(loss, torch.zeros(logits.shape[:-2], device=device))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.shape == logits.shape
    assert torch.equal(sigmoid_focal_loss_reference(logits, targets, 0.25, 2.0), loss)


@pytest.mark.parametrize(("alpha", "gamma"), PARAMETERS)
def test_gradcheck(device, alpha, gamma):
    logits, targets = make_inputs(device, queries=6, classes=5, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, targets, alpha=alpha, gamma=gamma), logits)


def losses_of(logits, alpha=0.25, gamma=2.0):
    """Loss and gradient of every logit by itself, [2, N], with its class present (row 0) and absent (row 1)."""
    targets = torch.tensor([0, NO_OBJECT], device=logits.device).view(2, 1, 1).expand(2, len(logits), 1)
    logits = logits.expand(2, -1).reshape(2, -1, 1, 1).requires_grad_()
    loss = ops.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad.view(2, -1)


def test_accurate_everywhere(device):
    logits = torch.linspace(-40, 40, 20001, device=device)
    units = 16 if device.type == "cpu" else 32  # a GPU's quotients are off by two units each
    for actual, expected in zip(losses_of(logits), losses_of(logits.double()), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=units * 2**-23, atol=1e-37)


@pytest.mark.parametrize("gamma", [2.0, 1.0, 0.0])
def test_extreme_logits_are_exact(device, gamma):
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4], device=device)
    loss, grad = losses_of(logits, alpha=0.25, gamma=gamma)
    margin = logits.clamp(min=0).cpu()
    torch.testing.assert_close(loss.cpu(), torch.stack((0.25 * margin.flip(0), 0.75 * margin)), rtol=1e-6, atol=1e-30)
    right = torch.tensor([0.0, 0, 1, 1])
    torch.testing.assert_close(grad.cpu(), torch.stack((-0.25 * right.flip(0), 0.75 * right)), rtol=1e-6, atol=1e-30)


def test_a_confident_hit_costs_nothing_beside_many_misses(device):
    """The class of a target must not be counted among the absent ones, not even to be taken out again."""
    logits = torch.full((1, 50, 91), -200.0, device=device)
    targets = torch.arange(50, device=device).view(1, 50)
    logits.scatter_(2, targets.unsqueeze(-1), 1e4)
    assert ops.sigmoid_focal_loss(logits, targets).abs() < 1e-30


def test_not_a_number_stays_in_its_image_and_its_gradient_in_its_place(device):
    logits, targets = make_inputs(device)
    targets[0, 1, 4], targets[0, 2, 5] = 3, NO_OBJECT
    clean = losses_and_gradient(logits, targets)
    bad = logits.clone()
    bad[0, 1, 4, 3] = NAN  # a present class
    bad[0, 2, 5, 0] = NAN  # an absent one
    loss, grad = losses_and_gradient(bad, targets)
    touched = torch.zeros_like(loss, dtype=torch.bool)
    touched[0, 1:] = True
    assert torch.equal(loss.isnan(), touched)
    assert torch.equal(loss[~touched], clean[0][~touched])
    assert torch.equal(grad.isnan(), bad.isnan())
    assert torch.equal(grad[~bad.isnan()], clean[1][~bad.isnan()])


def losses_and_gradient(logits, targets, **parameters):
    logits = logits.detach().requires_grad_()
    loss = ops.sigmoid_focal_loss(logits, targets, **parameters)
    (grad,) = torch.autograd.grad(loss, logits, torch.linspace(1, 2, loss.numel()).view_as(loss).to(loss))
    return loss.detach(), grad


def test_ignored_rows_count_nothing_whatever_they_hold(device):
    logits, targets = make_inputs(device)
    targets[:, :, 3::4] = IGNORED
    kept = targets != IGNORED
    logits[~kept] = NAN
    loss, grad = losses_and_gradient(logits, targets)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        own = kept[tuple(index)]
        alone = ops.sigmoid_focal_loss(logits[tuple(index)][own], targets[tuple(index)][own])
        torch.testing.assert_close(loss[tuple(index)], alone)
    assert (grad[~kept] == 0).all()
    assert (grad[kept] != 0).all()
    reference = sigmoid_focal_loss_backward_reference(torch.ones_like(loss), logits, targets, 0.25, 2.0)
    assert (reference[~kept] == 0).all()


@pytest.mark.parametrize("target", [7, -3, 2**62, -(2**63)])
def test_an_unknown_class_is_not_a_number(device, target):
    logits, targets = make_inputs(device)
    targets[1, 2, 5] = target
    loss, grad = losses_and_gradient(logits, targets)
    assert loss.isnan().nonzero().tolist() == [[1, 2]]
    expected = torch.zeros_like(grad, dtype=torch.bool)
    expected[1, 2, 5] = True
    assert torch.equal(grad.isnan(), expected)
    assert torch.equal(sigmoid_focal_loss_reference(logits, targets, 0.25, 2.0).isnan(), loss.isnan())
    upstream = torch.ones_like(loss)
    assert torch.equal(sigmoid_focal_loss_backward_reference(upstream, logits, targets, 0.25, 2.0).isnan(), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 5:],
        lambda x: x.flip(2)[:, :, ::2],
        lambda x: x.flip(-1).transpose(2, -1).contiguous().transpose(2, -1),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(4, *x.shape[1:]),
    ],
    ids=["after denoising queries", "every other query", "class-major", "image-major", "expanded"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(device, view, dtype):
    logits, targets = make_inputs(device, queries=31, dtype=dtype)
    logits, targets = view(logits), view(targets.unsqueeze(-1).expand(-1, -1, -1, 2))[..., 0]
    expected = losses_and_gradient(logits.contiguous(), targets.contiguous())
    losses, gradient = losses_and_gradient(logits, targets)
    # A GPU adds up a tile in an order that depends on how its threads read it.
    torch.testing.assert_close(losses, expected[0], rtol=0 if device.type == "cpu" else 1e-6, atol=0)
    assert torch.equal(gradient, expected[1])
    upstream = torch.ones((), device=device).expand(expected[0].shape)
    grad = OP_BACKWARD(upstream, logits, targets, 0.25, 2.0)
    assert grad.is_contiguous()
    assert torch.equal(grad, OP_BACKWARD(upstream.contiguous(), logits.contiguous(), targets.contiguous(), 0.25, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(device, layout, dtype):
    logits, targets = make_inputs(device, dtype=dtype)
    if layout == "permuted":
        logits = logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        targets = (
            targets.t().contiguous().t() if targets.dim() == 2 else targets.transpose(0, 2).contiguous().transpose(0, 2)
        )
    upstream = torch.rand_like(OP(logits, targets, 0.25, 2.0))
    torch.library.opcheck(OP_BACKWARD, (upstream, logits, targets, 0.25, 2.0))
    torch.library.opcheck(OP, (logits.requires_grad_(), targets, 0.25, 2.0))


def test_double_backward_is_refused(device):
    logits, targets = make_inputs(device)
    loss = ops.sigmoid_focal_loss(logits.requires_grad_(), targets)
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_compiles_as_one_graph(device):
    logits, targets = make_inputs(device)
    logits.requires_grad_()
    compiled = torch.compile(ops.sigmoid_focal_loss, fullgraph=True, backend="aot_eager")
    expected = ops.sigmoid_focal_loss(logits, targets, gamma=1.5)
    actual = compiled(logits, targets, gamma=1.5)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (actual, expected)))


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors(fake_device):
    with FakeTensorMode(), torch.device(fake_device):
        logits = torch.empty(3, 6, 2, 9, 5, dtype=torch.bfloat16).transpose(0, 1)
        targets = torch.empty(6, 3, 2, 9, dtype=torch.int64)
        loss = ops.sigmoid_focal_loss(logits, targets)
        grad = OP_BACKWARD(loss, logits, targets, 0.25, 2.0)
    assert (loss.shape, loss.dtype, loss.device.type) == ((6, 3, 2), torch.float32, fake_device)
    assert (grad.shape, grad.dtype, grad.device.type) == (logits.shape, torch.bfloat16, fake_device)
    assert grad.is_contiguous()


def test_autocast_does_not_lower_the_precision(device):
    inputs = make_inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = ops.sigmoid_focal_loss(*inputs)
    assert torch.equal(loss, ops.sigmoid_focal_loss(*inputs))


def test_threads_and_runs_agree():
    inputs = make_inputs(leading=(6, 2), queries=700, classes=30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(losses_and_gradient(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1]) for loss, grad in results)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The kernel chooses its instruction set once per process: run a few cases in another process."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    chosen = "(test_matches_reference and cpu and coco and not float16) or test_accurate_everywhere"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 20, 7).int()}, TypeError, "logits must be float32.* got torch.int32"),
        ({"logits": torch.zeros(7)}, ValueError, r"logits must have shape \[..., Q, C\], got \[7\]"),
        ({"target_classes": torch.zeros(2, 3, 20)}, TypeError, "target_classes must be int64, got torch.float32"),
        ({"target_classes": torch.zeros(2, 20).long()}, ValueError, r"target_classes must have shape \[2, 3, 20\]"),
        (
            {"target_classes": torch.zeros(2, 3, 20, device="meta").long()},
            ValueError,
            "target_classes must lie on the device of logits, cpu, got meta",
        ),
        ({"gamma": -1.0}, ValueError, "gamma must not be negative"),
    ],
)
def test_errors(change, error, message):
    logits, targets = make_inputs()
    with pytest.raises(error, match=message):
        ops.sigmoid_focal_loss(**{"logits": logits, "target_classes": targets, **change})


def test_kernel_rejects_what_it_would_misread():
    if ops.backends()["sigmoid_focal_loss"]["cpu"] != "C++":
        pytest.skip("the C++ kernel is not built")
    logits, targets = make_inputs()
    loss = OP(logits, targets, 0.25, 2.0)
    with pytest.raises(RuntimeError, match="int64"):
        OP(logits, targets.int(), 0.25, 2.0)
    with pytest.raises(RuntimeError, match="the shape of logits"):
        OP(logits, targets[:, :2], 0.25, 2.0)
    with pytest.raises(RuntimeError, match="grad_out"):
        OP_BACKWARD(loss[:1], logits, targets, 0.25, 2.0)
    with pytest.raises(RuntimeError, match="grad_out"):
        OP_BACKWARD(loss.double(), logits, targets, 0.25, 2.0)
