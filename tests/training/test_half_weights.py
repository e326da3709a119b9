"""Weights that are cast all at once: the same numbers as autocast's, by a fraction of its operators."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from small_graphs import batches_of
from test_passes import MASKS, MODELS, small_batch, small_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.engine import build_accelerator
from groupdetr_fast.training.half_weights import HalfWeights, forward_precision
from groupdetr_fast.training.passes import GroupPasses
from groupdetr_fast.training.recompute import recompute_decoder_layers

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def float32(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def two_batches(model, dtype, cast, device="cpu", groups_per_pass=0, masks=False):
    """The losses of two batches, and their gradients, added up."""
    criterion = gd.build_criterion(model)
    model.zero_grad()
    torch.manual_seed(7)
    losses = []

    @contextmanager
    def precision():
        with torch.autocast(device, dtype), cast():
            yield

    for seed in (3, 4):
        batch = small_batch(3, 2, seed=seed, masks=masks)
        images, padding = batch.images.float().to(device), batch.masks.to(device)
        targets = batch.targets._map(float32).to(device)
        totals = StepTotals.of([targets])
        if groups_per_pass:
            passes = GroupPasses(model, criterion, groups_per_pass)
            found = passes(images, padding, targets, totals, autocast=precision)
        else:
            with precision():
                out = model(images, padding, targets)
            found = criterion(out, targets, totals)
            found["loss"].backward()
        losses.append(found["loss"].item())
    return losses, gradients(model)


def assert_like_autocast(model, dtype, device="cpu", **options):
    losses, expected = two_batches(model, dtype, nullcontext, device, **options)
    weights = HalfWeights(model, dtype)
    two_batches(model, dtype, weights.cast, device, **options)  # the first pass finds out which weights autocast casts
    with Casts() as counted:
        found_losses, found = two_batches(model, dtype, weights.cast, device, **options)
    assert counted.at_once > 0
    assert counted.of_weights == 0
    assert found_losses == losses
    assert found.keys() == expected.keys()
    assert len(expected) > 20
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        assert found[name].dtype == torch.float32
        assert found[name].stride() == gradient.stride()


class Casts(TorchDispatchMode):
    """Counts casts of single weights, and copies of many tensors at once."""

    def __init__(self):
        super().__init__()
        self.of_weights = self.at_once = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        self.of_weights += name == "_to_copy" and isinstance(args[0], nn.Parameter)
        self.at_once += name == "_foreach_copy_"
        return function(*args, **(kwargs or {}))


@TYPES
@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_losses_and_gradients_are_those_of_autocast(name, overrides, dtype):
    assert_like_autocast(small_model(name, **overrides).float(), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@TYPES
@pytest.mark.parametrize("name", ["conditional_detr_r50", "dn_detr_r50"])  # no sums whose order changes
def test_those_of_a_gpu_too(name, dtype):
    assert_like_autocast(small_model(name).float().cuda(), dtype, "cuda")


@TYPES
def test_those_of_masks_too(dtype):
    assert_like_autocast(small_model("mask2former_r50", **MASKS).float(), dtype, masks=True)


def test_dropout_frozen_weights_and_a_resnet():
    model = gd.build_model(
        "conditional_detr_r50",
        num_classes=4,
        num_groups=2,
        num_queries=5,
        d_model=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        dim_feedforward=24,
        dropout=0.1,
        frozen_stages=2,
        backbone_weights=None,
    ).train()
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert len(frozen) > 10
    assert_like_autocast(model, torch.bfloat16)
    assert not gradients(model).keys() & set(frozen)


def test_groups_in_passes():
    assert_like_autocast(small_model("dn_detr_r50").float(), torch.bfloat16, groups_per_pass=1)


def test_layers_that_are_computed_again():
    model = small_model("conditional_detr_r50", dropout=0.1).float()
    recompute_decoder_layers(model)
    losses, expected = two_batches(model, torch.bfloat16, nullcontext)
    weights = HalfWeights(model, torch.bfloat16)
    for _ in range(2):
        found_losses, found = two_batches(model, torch.bfloat16, weights.cast)
    assert found_losses == losses
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


class Odd(nn.Module):
    """A layer for each way in which a weight may not be what autocast casts once."""

    class Standardised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.std())

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.table.weight
        self.plain = nn.Linear(4, 4)
        self.standardised = self.Standardised(4, 4)
        self.normalised = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.precise = nn.Linear(4, 4)
        self.sometimes = nn.Linear(4, 4)
        self.wide = nn.Linear(4, 4).double()
        self.unused = nn.Linear(4, 4)

    def forward(self, indices):
        x = self.normalised(self.standardised(self.plain(self.tied(self.table(indices)))))
        x = self.sometimes(x)
        with torch.autocast("cpu", enabled=False):
            x = self.sometimes(self.precise(x.float()))
        return x + self.wide.weight.float().sum()


def test_what_autocast_does_not_cast_stays_as_it_is():
    torch.manual_seed(0)
    model, indices = Odd().eval(), torch.tensor([0, 3])
    weights = HalfWeights(model, torch.bfloat16)
    found = []
    for cast in (nullcontext, weights.cast, weights.cast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), cast():
            out = model(indices)
        out.square().sum().backward()
        found.append(gradients(model))
    for gradient_of in found[1:]:
        assert gradient_of.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert torch.equal(gradient_of[name], gradient), name
    with weights.cast():
        halves = {name for name, layer in model.named_modules() if "weight" in vars(layer)["_parameters"]}
        halves = {name for name in halves if model.get_submodule(name).weight.dtype == torch.bfloat16}
    assert halves == {"tied", "plain"}


def test_the_weights_come_back_after_a_fault():
    model = Odd()
    before = dict(model.named_parameters())
    weights = HalfWeights(model, torch.bfloat16)
    weights.take([model.plain])

    def fail():
        with weights.cast():
            assert model.plain.weight.dtype == torch.bfloat16
            raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        fail()
    after = dict(model.named_parameters())
    assert all(after[name] is weight for name, weight in before.items())
    assert after.keys() == before.keys()
    assert not any(module._forward_pre_hooks for module in (model.plain, model.tied))


@pytest.mark.parametrize("groups_per_pass", [0, 1])
def test_the_training_loop_casts_at_once(trainer_in, groups_per_pass):
    trainer = trainer_in("run", cuda_graphs=0, precision="bf16", groups_per_pass=groups_per_pass, accumulate=2)
    batches = batches_of(4)
    trainer.run_step(batches[:2])
    with Casts() as counted:
        trainer.run_step(batches[2:])
    assert counted.of_weights == 0
    assert counted.at_once >= 2 * 2  # of each batch forward and backward


@pytest.mark.parametrize(
    ("precision", "distributed", "compiled", "at_once"),
    [
        ("bf16", DistributedType.NO, False, True),
        ("fp16", DistributedType.NO, False, True),
        ("bf16", DistributedType.NO, True, False),
        ("bf16", DistributedType.MULTI_CPU, False, False),
        ("bf16", DistributedType.FSDP, False, False),
        ("no", DistributedType.NO, False, False),
    ],
)
def test_which_trainings_cast_at_once(precision, distributed, compiled, at_once):
    accelerator = SimpleNamespace(mixed_precision=precision, distributed_type=distributed, autocast=nullcontext)
    entered = forward_precision(Odd(), accelerator, compiled=compiled)
    assert (entered is not nullcontext) == at_once


def test_accelerate_names_the_precisions_so(tmp_path):
    assert build_accelerator(OptimizationConfig(precision="bf16"), tmp_path, cpu=True).mixed_precision == "bf16"
    assert build_accelerator(OptimizationConfig(precision="no"), tmp_path, cpu=True).mixed_precision == "no"
