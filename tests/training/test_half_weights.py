"""Weights that are cast all at once: the same numbers as autocast's, by a fraction of its operators."""

from contextlib import nullcontext

import pytest
import torch
from test_passes import MASKS, MODELS, small_batch, small_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.engine import build_accelerator
from groupdetr_fast.training.half_weights import HalfWeights, weight_casts
from groupdetr_fast.training.passes import GroupPasses
from groupdetr_fast.training.recompute import recompute_decoder_layers

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def float32(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def two_batches(model, dtype, cast, groups_per_pass=0, masks=False):
    """The losses of two batches, and their gradients, added up."""
    criterion = gd.build_criterion(model)
    model.zero_grad()
    torch.manual_seed(7)
    losses = []

    def autocast():
        return torch.autocast("cpu", dtype)

    for seed in (3, 4):
        batch = small_batch(3, 2, seed=seed, masks=masks)
        images, targets = batch.images.float(), batch.targets._map(float32)
        totals = StepTotals.of([targets])
        with cast():
            if groups_per_pass:
                passes = GroupPasses(model, criterion, groups_per_pass)
                found = passes(images, batch.masks, targets, totals, autocast=autocast)
            else:
                with autocast():
                    out = model(images, batch.masks, targets)
                found = criterion(out, targets, totals)
                found["loss"].backward()
        losses.append(found["loss"].item())
    return losses, gradients(model)


def assert_like_autocast(model, dtype, **options):
    losses, expected = two_batches(model, dtype, nullcontext, **options)
    found_losses, found = two_batches(model, dtype, HalfWeights(model, dtype).cast, **options)
    assert found_losses == losses
    assert found.keys() == expected.keys()
    assert len(expected) > 20
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        assert found[name].dtype == torch.float32
        assert found[name].stride() == gradient.stride()


@TYPES
@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_losses_and_gradients_are_those_of_autocast(name, overrides, dtype):
    assert_like_autocast(small_model(name, **overrides).float(), dtype)


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
    assert_like_autocast(model, torch.bfloat16)


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
        self.standardised = self.Standardised(4, 4)
        self.wide = nn.Linear(4, 4).double()
        self.unused = nn.Linear(4, 4)

    def forward(self, indices):
        x = self.standardised(self.tied(self.table(indices)))
        return x.float() + self.wide.weight.float().sum()


def test_what_autocast_does_not_cast_stays_as_it_is():
    torch.manual_seed(0)
    model, indices = Odd(), torch.tensor([0, 3])
    with torch.autocast("cpu", torch.bfloat16):
        model(indices).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with HalfWeights(model, torch.bfloat16).cast():
        assert model.tied.weight.dtype == torch.bfloat16
        assert model.table.weight.dtype == model.standardised.weight.dtype == torch.float32
        assert model.wide.weight.dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            model(indices).square().sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys() == {"table.weight", "standardised.weight", "wide.weight"}
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_the_weights_come_back_after_a_fault():
    model = Odd()
    before = dict(model.named_parameters())
    with pytest.raises(KeyError, match="a fault"), HalfWeights(model, torch.bfloat16).cast():
        raise KeyError("a fault")
    after = dict(model.named_parameters())
    assert all(after[name] is weight for name, weight in before.items())
    assert after.keys() == before.keys()


class Casts(TorchDispatchMode):
    """Counts casts, and copies of many tensors at once."""

    def __init__(self):
        super().__init__()
        self.single = self.at_once = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        self.single += name == "_to_copy"
        self.at_once += name == "_foreach_copy_"
        return function(*args, **(kwargs or {}))


def test_a_step_casts_no_weight_by_itself():
    model = small_model("conditional_detr_r50").float()
    counts = {}
    for cast in (nullcontext, HalfWeights(model, torch.bfloat16).cast):
        with Casts() as counts[cast]:
            two_batches(model, torch.bfloat16, cast)
    plain, here = counts.values()
    cast = [w for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for w in m.parameters(recurse=False)]
    assert plain.at_once == 0
    assert here.at_once == 2 * 2  # forward and backward, two batches
    # A weight that no loss depends on is cast as well, and has no gradient; norms of the backbone are no part of it.
    assert plain.single - here.single >= 2 * 2 * len(cast) - 2 * len([w for w in cast if w.grad is None])


@pytest.mark.parametrize(
    ("settings", "compiled", "is_cast"),
    [({"precision": "bf16"}, False, True), ({"precision": "bf16"}, True, False), ({"precision": "no"}, False, False)],
)
def test_which_trainings_cast_at_once(tmp_path, settings, compiled, is_cast):
    accelerator = build_accelerator(OptimizationConfig(**settings), tmp_path, cpu=True)
    assert (weight_casts(Odd(), accelerator, compiled=compiled) is not nullcontext) == is_cast
