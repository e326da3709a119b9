"""What is captured of a step as a CUDA graph, run without a capture: it depends on no batch, and meets no host."""

import pytest
import torch
from small_graphs import CONDITIONAL, CONFIG, DINO, Operators, assert_close, batch_of, batches_of, build
from torch._subclasses import FakeTensorMode

import groupdetr_fast as gd
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.training.device_step import DeviceStep
from groupdetr_fast.training.ema import AveragedWeights
from groupdetr_fast.training.graph_sizes import GraphSizes
from groupdetr_fast.training.graphs import CapturableStep, StepInputs
from groupdetr_fast.training.optimization import build_optimizer

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default")


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        (CONDITIONAL, {"dropout": 0.1}),
        (DINO, {}),
        pytest.param("dn_detr_r50", {"dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param("dab_deformable_detr_r50", {}, marks=pytest.mark.slow),
    ],
)
def test_operators_do_not_depend_on_the_batch(trainer_in, model, overrides):
    trainer = trainer_in("run", model=model, overrides=overrides, ema_decay=0.9)
    trainer.run_step(batches_of(1))  # makes the optimiser's state
    logs = []
    for numbers, size, spoilt in [((4, 1), (64, 64), False), ((0, 0), (40, 56), False), ((2, 3), (64, 33), True)]:
        batch = batch_of(*numbers, size=size, spoilt=spoilt)
        inputs = StepInputs.like(batch, 64, 64, 4)
        inputs.fill(batch)
        with Operators() as log:
            trainer.graphs.step([inputs])
        logs.append(log.seen)
    first, *others = logs
    assert len(first) > 1000
    for other in others:
        assert other == first
    assert not [name for name, *_ in first if any(part in name for part in SYNCHRONISING)]


ASSIGNMENTS = {  # of the measurements, beside that of Group DETR
    "one-to-one": {"assignment": "one_to_one"},
    "one-to-many": {"assignment": "one_to_many", "positives": 3},
    "groups without separate self-attention": {"positives": 2},
}


@pytest.mark.parametrize("kind", [DeviceStep, CapturableStep])
@pytest.mark.parametrize(
    ("model", "assignment"),
    [
        *((model, {}) for model in (CONDITIONAL, DINO, "dn_detr_r50", "dab_deformable_detr_r50")),
        *(pytest.param(CONDITIONAL, assignment, id=name) for name, assignment in ASSIGNMENTS.items()),
    ],
)
def test_a_step_on_fake_gpu_tensors_never_meets_the_host(model, assignment, kind):
    """Any synchronisation raises there, and no operator takes or gives a tensor of the CPU."""
    with FakeTensorMode(), torch.device("cuda"):
        detector = build(model, dropout=0.1).train()
        criterion = gd.build_criterion(detector, **assignment)

        def add_gradients(batches):
            (inputs,) = batches
            output = detector(inputs.images, inputs.masks, inputs.targets)
            losses = criterion(output, inputs.targets, StepTotals.of([inputs.targets]))
            for parameter in detector.parameters():  # a backward pass would need a GPU even for fake tensors
                parameter.grad = torch.zeros_like(parameter)
            return [losses], torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)

        step = kind(add_gradients, detector, build_optimizer(detector, CONFIG), AveragedWeights(detector, decay=0.9))
        targets = gd.PackedTargets(
            torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.int64), (4, 4)
        )
        inputs = StepInputs(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), targets)
        with Operators() as log:
            outcome = step([inputs])
        assert outcome.broken.device.type == "cuda"
    assert any("_fused_adamw_" in name for name, *_ in log.seen)
    assert [seen for seen in log.seen if "cpu" in seen[2]] == []


@pytest.mark.parametrize("model", [CONDITIONAL, DINO, "dab_deformable_detr_r50"])
def test_padding_changes_neither_losses_nor_gradients(model):
    detector = build(model, **({"denoising_queries": 0} if model == DINO else {}))
    criterion = gd.build_criterion(detector)
    results = []
    for padded in (False, True):
        inputs = batch_of(3, 1)
        if padded:
            room = StepInputs.like(inputs, 64, 64, 16)
            room.fill(batch_of(7, 9, seed=5))  # nothing of an earlier batch may be left
            room.fill(inputs)
            inputs = room
        detector.train().zero_grad()
        output = detector(inputs.images, inputs.masks, inputs.targets)
        losses = criterion(output, inputs.targets, StepTotals.of([inputs.targets]))
        losses["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}
        results.append(({name: value.detach() for name, value in losses.items()}, gradients))
    assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 56), (64, 33)])
def test_inputs_hold_a_smaller_batch(size):
    room = StepInputs.like(batch_of(1, 2), 64, 128, 4)
    room.fill(batch_of(4, 4, size=(64, 128), seed=1))
    batch = batch_of(1, 2, size=size)
    room.fill(batch)
    height, width = size
    assert torch.equal(room.images[..., :height, :width], batch.images)
    assert torch.equal(room.masks[..., :height, :width], batch.masks)
    assert not room.images[..., height:, :].any()
    assert not room.images[..., width:].any()
    assert room.masks[:, height:].all()
    assert room.masks[..., width:].all()
    assert torch.equal(room.targets.boxes[:, :2], batch.targets.boxes)
    assert torch.equal(room.targets.labels[:, :2], batch.targets.labels)
    assert not room.targets.boxes[:, 2:].any()
    assert room.targets.num_targets.tolist() == [1, 2]


def test_sizes_are_padded_to_few():
    sizes = GraphSizes(4, image_multiple=32, targets=(4, 8))
    assert sizes.padded([batch_of(4, 1, size=(33, 64))]) == ((2,), 64, 64, 4)
    assert sizes.padded([batch_of(5, 1, size=(8, 8)), batch_of(0, size=(8, 40))]) == ((2, 1), 32, 64, 8)
    assert sizes.padded([batch_of(9, 1)]) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 0}, "number and image_multiple must be at least 1"),
        ({"number": 1, "image_multiple": 0}, "number and image_multiple must be at least 1"),
        ({"number": 1, "targets": ()}, "targets must be positive and rise"),
        ({"number": 1, "targets": (8, 4)}, "targets must be positive and rise"),
    ],
)
def test_wrong_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GraphSizes(**settings)
