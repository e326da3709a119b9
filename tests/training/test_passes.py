"""Passes over some of the groups give the gradients of all groups at once, in the memory of a few."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import groupdetr_fast as gd
from groupdetr_fast.losses import mask_criterion
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.testing import peak_bytes
from groupdetr_fast.training.passes import GroupPasses, average_gradients

SMALL = {
    "num_queries": 5,
    "d_model": 16,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dim_feedforward": 24,
    "dropout": 0.0,
}
NO_NOISE = {"label_noise": 0.0, "box_noise": 0.0}
MASKS = {"encoder_dim_feedforward": 24, "loss_points": 16, "mask_cost": 0.0, "dice_cost": 0.0}
MODELS = [
    pytest.param("conditional_detr_r50", {}, id="conditional"),
    pytest.param("dab_detr_r50", {}, id="dab"),
    pytest.param("dn_detr_r50", {}, id="dn, one set"),
    pytest.param("dn_detr_r50", {"denoising_scope": "every", **NO_NOISE}, id="dn, a set per group"),
    pytest.param("dab_deformable_detr_r50", {}, id="dab deformable"),
    pytest.param("dino_4scale_r50", {}, id="dino, one set"),
    pytest.param("dino_4scale_r50", {"denoising_scope": "every", **NO_NOISE}, id="dino, a set per group"),
]


def small_model(name, num_groups=3, **overrides):
    torch.manual_seed(1)
    backbone = "conv:8-16-16-16" if name.startswith("mask") else "conv:8-16-16"
    settings = {**SMALL, "backbone": backbone, **overrides}
    model = gd.build_model(name, num_classes=4, num_groups=num_groups, **settings).double()
    for key, parameter in model.named_parameters():
        if "bbox_embed" in key:  # zero at first, which would hide what they depend on
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def small_batch(*sizes, seed=0, masks=False):
    """Images of 48 x 64 pixels, of which the last is padded, with so many objects."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(sizes), 3, 48, 64, dtype=torch.float64, generator=generator)
    padding = torch.zeros(len(sizes), 48, 64, dtype=torch.bool)
    padding[-1, 40:] = True
    targets = []
    for size in sizes:
        centers = torch.rand(size, 2, dtype=torch.float64, generator=generator) * 0.6 + 0.2
        extents = torch.rand(size, 2, dtype=torch.float64, generator=generator) * 0.3 + 0.05
        target = {
            "labels": torch.randint(4, (size,), generator=generator),
            "boxes": torch.cat((centers, extents), dim=1),
        }
        if masks:
            target["masks"] = torch.rand(size, 40, 64, generator=generator) > 0.5
        targets.append(target)
    return SimpleNamespace(images=images, masks=padding, targets=gd.PackedTargets.from_list(targets))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def all_at_once(model, criterion, batches):
    model.zero_grad()
    torch.manual_seed(7)
    totals = StepTotals.of([batch.targets for batch in batches])
    sums = {}
    for batch in batches:
        losses = criterion(model(batch.images, batch.masks, batch.targets), batch.targets, totals)
        losses["loss"].backward()
        sums = {name: sums.get(name, 0) + value.item() for name, value in losses.items()}
    return sums, gradients(model)


def in_passes(model, criterion, batches, groups_per_pass):
    model.zero_grad()
    torch.manual_seed(7)
    totals = StepTotals.of([batch.targets for batch in batches])
    passes = GroupPasses(model, criterion, groups_per_pass)
    sums = {}
    for batch in batches:
        losses = passes(batch.images, batch.masks, batch.targets, totals)
        sums = {name: sums.get(name, 0) + value.item() for name, value in losses.items()}
    return sums, gradients(model)


@pytest.mark.parametrize("groups_per_pass", [1, 2, 3])
@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_gradients_are_those_of_all_groups_at_once(name, overrides, groups_per_pass):
    model = small_model(name, **overrides)
    criterion = gd.build_criterion(model)
    batches = [small_batch(3, 2)]
    expected_losses, expected = all_at_once(model, criterion, batches)
    losses, found = in_passes(model, criterion, batches, groups_per_pass)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_also_over_accumulated_batches():
    model = small_model("dn_detr_r50")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    criterion = gd.build_criterion(model)
    batches = [small_batch(3, 1), small_batch(0, 0, seed=1), small_batch(2, seed=2)]
    expected_losses, expected = all_at_once(model, criterion, batches)
    torch.manual_seed(7)
    losses, found = in_passes(model, criterion, batches, 1)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def set_points(monkeypatch):
    """Points are drawn at random, others by each call: here the costs have none, and those of the losses are set."""
    line = torch.linspace(0.1, 0.9, MASKS["loss_points"])
    monkeypatch.setattr(mask_criterion, "uncertain_points", lambda logits, *_: line[:, None].repeat(len(logits), 1, 2))


@pytest.mark.parametrize("groups_per_pass", [1, 2])
def test_masks_too(groups_per_pass, monkeypatch):
    set_points(monkeypatch)
    model = small_model("mask2former_r50", **MASKS)
    criterion = gd.build_criterion(model)
    batch = small_batch(2, 3, masks=True)
    expected_losses, expected = all_at_once(model, criterion, [batch])
    losses, found = in_passes(model, criterion, [batch], groups_per_pass)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # this criterion computes in float32


def test_what_cannot_be_done_is_refused():
    model = small_model("conditional_detr_r50")
    with pytest.raises(ValueError, match="assigned to each of the 3 groups of queries by itself"):
        GroupPasses(model, gd.build_criterion(model, assignment="one_to_one"), 1)
    with pytest.raises(ValueError, match="Linear cannot run groups_per_pass=2 of its groups at a time"):
        GroupPasses(torch.nn.Linear(1, 1), gd.build_criterion(model), 2)


@pytest.mark.parametrize("wrong", ["images", "masks", "size of masks", "targets", "number of targets"])
def test_a_wrong_batch_is_refused_as_without_passes(wrong):
    model = small_model("dn_detr_r50")
    batch = small_batch(3, 2)
    totals = StepTotals.of([batch.targets])
    if wrong == "images":
        batch.images = batch.images[:, :1]
    elif wrong == "masks":
        batch.masks = batch.masks.long()
    elif wrong == "size of masks":
        batch.masks = batch.masks[:, :24]
    elif wrong == "targets":
        batch.targets = [{}]
    else:
        batch.targets = small_batch(3).targets
    with pytest.raises((TypeError, ValueError)) as expected:
        model(batch.images, batch.masks, batch.targets)
    with pytest.raises(expected.type) as found:
        GroupPasses(model, gd.build_criterion(model), 1)(batch.images, batch.masks, batch.targets, totals)
    assert str(found.value) == str(expected.value)


PROPORTIONS = {  # those of a real model
    **SMALL,
    "num_queries": 60,
    "d_model": 64,
    "num_heads": 4,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "dim_feedforward": 256,
    "backbone": "conv:16-32-64",
}


def step_of(num_groups, groups_per_pass, overrides, size):
    """A step on two images of ``size`` times ``size`` pixels."""
    torch.manual_seed(0)
    model = gd.build_model("conditional_detr_r50", num_classes=20, num_groups=num_groups, **overrides).train()
    criterion = gd.build_criterion(model)
    images = torch.randn(2, 3, size, size)
    targets = small_batch(6, 6).targets
    totals = StepTotals.of([targets])

    def step():
        if groups_per_pass:
            GroupPasses(model, criterion, groups_per_pass)(images, None, targets, totals)
        else:
            criterion(model(images, None, targets), targets, totals)["loss"].backward()

    return step


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        pytest.param(PROPORTIONS, 128, id="small"),
        pytest.param({"backbone_weights": None}, 480, id="paper's sizes", marks=pytest.mark.slow),
    ],
)
def test_memory_of_eleven_groups_is_that_of_one(overrides, size):
    peak_bytes(step_of(1, 0, overrides, size))  # warm up
    one = peak_bytes(step_of(1, 0, overrides, size))
    eleven, in_turn = (peak_bytes(step_of(11, groups, overrides, size)) for groups in (0, 1))
    print(f"MiB: K=1 {one / 2**20:.1f}; K=11 {eleven / 2**20:.1f}; K=11, one group per pass {in_turn / 2**20:.1f}")
    assert in_turn <= 1.15 * one
    assert eleven > 2 * one  # or the comparison would show nothing


def _process(rank, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = [small_batch(3, 1, seed=rank), small_batch(2, seed=10 + rank)]
    model = small_model("dn_detr_r50")
    criterion = gd.build_criterion(model)
    in_passes(model, criterion, batches, 1)
    average_gradients(model.parameters())
    found = gradients(model)

    model = small_model("dn_detr_r50")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    totals = StepTotals.of([batch.targets for batch in batches])
    torch.manual_seed(7)
    with wrapped.no_sync():
        criterion(wrapped(batches[0].images, batches[0].masks, batches[0].targets), batches[0].targets, totals)[
            "loss"
        ].backward()
    last = batches[1]
    criterion(wrapped(last.images, last.masks, last.targets), last.targets, totals)["loss"].backward()
    expected = gradients(model)
    results.put((rank, {name: (found[name] - expected[name]).abs().max().item() for name in expected}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_processes_are_averaged(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_process, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in processes:
        process.start()
    differences = [results.get(timeout=200)[1] for _ in processes]
    for process in processes:
        process.join()
    assert all(difference < 1e-8 for of_rank in differences for difference in of_rank.values())
    assert "backbone.body.stages.0.0.weight" in differences[0]
