"""Ops called from eager Python: the short way gives the same as the dispatcher, and is left where it would show."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast import ops
from groupdetr_fast._eager import meets_only_autograd
from groupdetr_fast.ops.grouped_attention import op as attention
from groupdetr_fast.ops.ms_deform_attn import op as deformable
from groupdetr_fast.ops.sigmoid_focal_loss import op as class_loss


def attend(query, key, value):
    return ops.grouped_attention(query, key, value, 2)


def attend_with_dropout(query, key, value):
    torch.manual_seed(0)
    return ops.grouped_attention(query, key, value, 2, dropout_p=0.5)


def sample(value, locations, weights):
    return ops.ms_deform_attn(value, [(2, 3), (1, 2)], locations, weights)


def class_losses(logits):
    return ops.sigmoid_focal_loss(logits, torch.tensor([[0, -1, 2], [-2, 1, -1]]))


SHAPES = {
    attend: [(2, 6, 2, 4)] * 3,
    attend_with_dropout: [(2, 6, 2, 4)] * 3,
    sample: [(2, 8, 2, 4), (2, 5, 2, 2, 3, 2), (2, 5, 2, 2, 3)],
    class_losses: [(2, 3, 3)],
}
MODULES = {attend: attention, attend_with_dropout: attention, sample: deformable, class_losses: class_loss}
every_op = pytest.mark.parametrize("run", SHAPES, ids=lambda run: run.__name__)


def make_inputs(run, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES[run]]


def by_dispatcher():
    return mock.patch("groupdetr_fast._eager.meets_only_autograd", return_value=False)


def only_the_short_way(run):
    """Inside, the op must not get to its Autograd kernel."""
    refused = mock.Mock(side_effect=AssertionError("by the dispatcher"))
    return mock.patch.object(MODULES[run]._op, "_by_dispatcher", refused)


def results(run, inputs):
    out = run(*inputs)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gives_what_the_dispatcher_gives(run, dtype):
    inputs = make_inputs(run, dtype)
    with only_the_short_way(run):
        short = results(run, inputs)
    with by_dispatcher():
        expected = results(run, inputs)
    for actual, wanted in zip(short, expected, strict=True):
        assert torch.equal(actual, wanted)
        assert actual.stride() == wanted.stride()
    assert short[0].requires_grad
    with torch.no_grad(), only_the_short_way(run):
        assert torch.equal(run(*inputs), expected[0])
        assert not run(*inputs).requires_grad
    with torch.inference_mode(), only_the_short_way(run):
        assert torch.equal(run(*inputs), expected[0])


@pytest.mark.parametrize("run", [attend, sample, class_losses], ids=lambda run: run.__name__)
def test_gradients(run):
    with only_the_short_way(run):
        assert torch.autograd.gradcheck(run, make_inputs(run), fast_mode=True)


@every_op
def test_only_some_inputs_require_a_gradient(run):
    inputs = [tensor.detach() for tensor in make_inputs(run)]
    inputs[-1].requires_grad_()
    with only_the_short_way(run):
        (grad,) = torch.autograd.grad(run(*inputs).sum(), inputs[-1:])
    with by_dispatcher():
        (expected,) = torch.autograd.grad(run(*inputs).sum(), inputs[-1:])
    assert torch.equal(grad, expected)


@every_op
def test_double_backward_is_refused(run):
    inputs = make_inputs(run)
    with only_the_short_way(run):
        out = run(*inputs)
    (grad, *_) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@every_op
def test_saved_tensors_are_those_of_autograd(run):
    """Their hooks run (as those of checkpoints), and a change in place is an error."""
    inputs, packed = make_inputs(run), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        run(*inputs)
    assert any(tensor.shape == inputs[0].shape for tensor in packed)
    out = run(*inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_op
def test_autocast_leaves_the_dtype(run):
    inputs = make_inputs(run, torch.float32)
    expected = results(run, inputs)
    with torch.autocast("cpu", torch.bfloat16), only_the_short_way(run):
        actual = results(run, inputs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@every_op
def test_modes_see_the_op_and_its_backward(run):
    inputs = make_inputs(run)
    with Operators() as seen:
        out = run(*inputs)
    (name,) = [name for name in seen.names if name.startswith("groupdetr_fast::")]
    with Operators() as seen:
        out.sum().backward()
    assert f"{name}_backward" in seen.names


@every_op
def test_fake_tensors_run_the_fake(run):
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(tensor) for tensor in make_inputs(run)]
        out = run(*inputs)
        assert type(out).__name__ == "FakeTensor"
        assert torch.autograd.grad(out.sum(), inputs)[0].shape == inputs[0].shape


@every_op
def test_traces_have_the_op(run):
    graph = make_fx(run)(*make_inputs(run)).graph
    assert any(str(node.target).startswith("groupdetr_fast.") for node in graph.nodes)


@every_op
def test_profiles_have_the_op(run):
    inputs = make_inputs(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*inputs).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert len([name for name in names if name.startswith("groupdetr_fast::")]) >= 2


@every_op
def test_negated_views_are_resolved(run):
    """Their memory holds the opposite numbers."""
    inputs = [tensor.detach() for tensor in make_inputs(run)]
    expected = run(-inputs[0], *inputs[1:])
    actual = run(torch._neg_view(inputs[0]), *inputs[1:])
    torch.testing.assert_close(actual, expected)


@every_op
def test_function_modes_see_the_op(run):
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = make_inputs(run)
    with Functions():
        run(*inputs)
    assert any("groupdetr_fast" in name for name in seen)


def test_what_is_not_plain():
    plain = torch.zeros(1, requires_grad=True)
    assert meets_only_autograd((plain, torch.nn.Parameter(plain.detach())))

    class Own(torch.Tensor):
        pass

    assert not meets_only_autograd((plain, plain.detach().as_subclass(Own)))
    assert not meets_only_autograd((torch.zeros(1, device="meta"),))
    assert not meets_only_autograd((plain.detach().to_sparse(),))
    with torch._C._AutoDispatchBelowAutograd():
        assert not meets_only_autograd((plain,))
    seen = []
    torch.func.vmap(lambda x: seen.append(meets_only_autograd((x, plain))) or x)(torch.zeros(2))
    torch.func.grad(lambda x: seen.append(meets_only_autograd((plain,))) or x)(torch.tensor(1.0))
    torch.jit.trace(lambda x: seen.append(meets_only_autograd((x,))) or x, (torch.zeros(2),), check_trace=False)
    assert seen == [False, False, False]
    assert meets_only_autograd((plain,))


@every_op
def test_functional_gradients_are_refused_as_those_of_every_op_of_torch_library(run):
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda *args: run(*args).sum())(*[tensor.detach() for tensor in make_inputs(run)])
