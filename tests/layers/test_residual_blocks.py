"""ResNets whose convolutions take the norms after them, against torchvision's, which do not."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast.layers.frozen_batch_norm import FrozenBatchNorm2d
from groupdetr_fast.layers.residual_blocks import convolve, fold_norms

NETWORKS = ["resnet18", "resnet50", "resnext50_32x4d"]


class Norms(TorchDispatchMode):
    """Counts the norms that are computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "batch_norm" in function._schema.name
        return function(*args, **(kwargs or {}))


def make_networks(name):
    """torchvision's with its own frozen norms, and the same with norms folded."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(norm_layer=torchvision.ops.FrozenBatchNorm2d).double()
    for module in theirs.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.weight.uniform_(0.2, 0.6)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d).double()
    fold_norms(ours)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def pair():
    """A convolution and its norm, with numbers that are not those of a norm that does nothing."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2, bias=False), FrozenBatchNorm2d(8)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    return conv.double(), norm.double()


def norms_of(*arguments):
    with Norms() as norms:
        convolve(*arguments)
    return norms.count


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_torchvisions(name):
    theirs, ours = make_networks(name)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    results = []
    for network in (theirs, ours):
        x = images.clone().requires_grad_()
        out = network(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, *(parameter.grad for parameter in network.parameters())))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_stem_has_a_norm_of_its_own(name):
    _, ours = make_networks(name)
    with Norms() as norms:
        ours(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert norms.count == 1  # which the backbone calls otherwise


def test_names_and_copies_stay():
    theirs, ours = make_networks("resnet50")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(images), ours(images), rtol=0, atol=0)


def test_a_pair_is_one_convolution(pair):
    conv, norm = pair
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    assert norms_of(conv, norm, x) == 0
    assert torch.autograd.gradcheck(lambda x, weight: convolve(conv, norm, x), (x, conv.weight))
    torch.testing.assert_close(convolve(conv, norm, x), norm(conv(x)), rtol=1e-12, atol=1e-12)


def test_weights_that_change_are_heeded(pair):
    conv, norm = pair
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    with torch.inference_mode():
        convolve(conv, norm, x)
        conv.weight.data.mul_(2)
        norm.running_mean.add_(1)
        torch.testing.assert_close(convolve(conv, norm, x), norm(conv(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("index", [0, 1])
def test_hooks_are_called(pair, kind, index):
    called = []
    getattr(pair[index], f"register_{kind}_hook")(lambda *_: called.append(kind))
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    convolve(*pair, x).sum().backward()
    assert called == [kind]


def test_other_modules_are_called(pair):
    conv, norm = pair
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    trained = nn.BatchNorm2d(8).double()
    biased = nn.Conv2d(6, 8, 3, dtype=torch.float64)
    reflecting = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", bias=False, dtype=torch.float64)
    for modules in ((conv, trained), (biased, norm), (reflecting, norm)):
        assert norms_of(*modules, x) == 1
        torch.testing.assert_close(convolve(*modules, x), modules[1](modules[0](x)), rtol=0, atol=0)


def test_under_autocast_the_norm_is_computed_as_before(pair):
    conv, norm = (module.float() for module in pair)
    x = torch.randn(2, 6, 9, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norms_of(conv, norm, x) == 1
        torch.testing.assert_close(convolve(conv, norm, x), norm(conv(x)), rtol=0, atol=0)


def test_a_compiler_gets_both_operators(pair):
    conv, norm = pair
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)

    class Pair(nn.Module):
        def forward(self, x):
            return convolve(conv, norm, x)

    program = torch.export.export(Pair(), (x,))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
    compiled = torch.compile(Pair(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), convolve(conv, norm, x), rtol=1e-12, atol=1e-12)
