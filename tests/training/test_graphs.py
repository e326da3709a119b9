"""Steps as CUDA graphs: what is captured runs here without a capture, and tests marked gpu capture it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import groupdetr_fast as gd
from groupdetr_fast.data import Batch
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.training import engine
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.device_step import DeviceStep
from groupdetr_fast.training.ema import AveragedWeights
from groupdetr_fast.training.engine import Trainer, TrainerSettings, build_accelerator
from groupdetr_fast.training.faults import TrainingError
from groupdetr_fast.training.graph_sizes import GraphSizes
from groupdetr_fast.training.graphs import WARM_UP, CapturableStep, StepInputs, check_graphs
from groupdetr_fast.training.optimization import build_optimizer

CLASSES = 5
TINY = {
    "num_queries": 8,
    "d_model": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dim_feedforward": 32,
    "backbone": "conv:8-8-8-8",
    "backbone_weights": None,
    "dropout": 0.0,
}
CONDITIONAL, DINO = "conditional_detr_r50", "dino_4scale_r50"
# A rate that float32 has exactly: kernels read it as such from the device, and as float64 from the host.
CONFIG = OptimizationConfig(
    lr=2.0**-10,
    backbone_lr=2.0**-11,
    weight_decay=2.0**-10,
    lr_drop=(1000,),
    cuda_graphs=2,
    graph_image_multiple=64,
    graph_targets=(4, 8),
)


def build(name=CONDITIONAL, **overrides):
    torch.manual_seed(0)
    return gd.build_model(name, num_classes=CLASSES, num_groups=2, **{**TINY, **overrides})


def batch_of(*numbers, size=(64, 64), seed=0, device="cpu", spoilt=False):
    """A batch with so many targets in each image; the last image is padded."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(numbers), 3, *size, generator=generator)
    masks = torch.zeros(len(numbers), *size, dtype=torch.bool)
    masks[-1, :, size[1] * 3 // 4 :] = True
    images = images.masked_fill(masks[:, None], 0)
    if spoilt:
        images[0, 0, 0, 0] = math.nan
    targets = [
        {
            "labels": torch.randint(CLASSES, (number,), generator=generator),
            "boxes": torch.rand(number, 4, generator=generator) * 0.4 + 0.2,
        }
        for number in numbers
    ]
    ids = [100 * seed + index for index in range(len(numbers))]
    batch = Batch(images, masks, gd.PackedTargets.from_list(targets), ids, torch.tensor([size] * len(numbers)))
    return batch.to(device)


def batches_of(steps, device="cpu", **options):
    """Batches whose images have 0 to 4 targets."""
    return [batch_of(step % 5, (3 * step + 1) % 4, seed=step, device=device, **options) for step in range(steps)]


class Numbers(torch.utils.data.Dataset):
    """Batches by their number, the second of which is spoilt."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return batch_of(1 + index % 3, index % 4, seed=index, spoilt=index == 1)


class InOrder(torch.utils.data.SequentialSampler):
    def set_epoch(self, epoch):
        pass


@pytest.fixture
def trainer_in(tmp_path, monkeypatch):
    """Makes trainers in folders of these names; each begins with the same weights and random states."""
    monkeypatch.setattr(engine, "check_graphs", lambda *arguments, observing: None)  # these run on the CPU too

    def make(name, device="cpu", model=CONDITIONAL, overrides=None, max_skipped_steps=10, observe=None, **options):
        optimization = replace(CONFIG, **options)
        PartialState._reset_state()  # which else keeps the device of an earlier test
        accelerator = build_accelerator(optimization, tmp_path / name, cpu=torch.device(device).type == "cpu")
        detector = build(model, **(overrides or {}))
        dataset = Numbers()
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=InOrder(dataset))
        settings = TrainerSettings(optimization, tmp_path / name, max_skipped_steps=max_skipped_steps)
        trainer = Trainer(accelerator, detector, gd.build_criterion(detector), loader, settings, observe=observe)
        trainer.state.model.train()
        return trainer

    return make


def tensors_of(trainer):
    """Copies of all that a step may change, by name."""
    state = trainer.state
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    optimizer = state.optimizer.state_dict()["state"]
    found |= {f"adam.{key}.{name}": value for key, values in optimizer.items() for name, value in values.items()}
    if state.average is not None:
        found |= {f"average.{name}": tensor for name, tensor in state.average.average.items()}
        found["average.updates"] = state.average.updates
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def assert_close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def run(trainer, steps):
    """The losses of steps of one batch each."""
    losses = torch.stack([trainer.run_step([batch])["loss"] for batch in steps])
    trainer.ledger.settle()
    return losses.cpu()


def uncaptured(trainer):
    """The same trainer, whose steps are padded and run on the device alone, and which captures none of them."""
    trainer.graphs.warm_up = 10**9
    return trainer


# --- What is captured ---


class Operators(TorchDispatchMode):
    """Names of all operators that run inside, sizes of what they take, and devices of what they take and give."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Which has no implementation for fake tensors, and returns nothing.
        adam = function.overloadpacket is torch.ops.aten._fused_adamw_ and isinstance(args[0][0], FakeTensor)
        result = None if adam else function(*args, **(kwargs or {}))
        taken, given = ([x for x in tree_leaves(tree) if torch.is_tensor(x)] for tree in ((args, kwargs), result))
        sizes = [tuple(tensor.shape) for tensor in taken]
        self.seen.append((str(function), sizes, {tensor.device.type for tensor in (*taken, *given)}))
        return result


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


# --- In the training loop ---


def test_steps_are_those_without_graphs(trainer_in, device):
    """Up to rounding: sums over padded targets have more terms."""
    options = {"device": device, "ema_decay": 0.9}
    batches = batches_of(2 * WARM_UP, device)
    expected, found = trainer_in("eager", **options, cuda_graphs=0), trainer_in("graphs", **options)
    torch.testing.assert_close(run(found, batches), run(expected, batches), rtol=1e-3, atol=1e-3)
    assert found.state.current.steps == expected.state.current.steps == 2 * WARM_UP
    assert found.state.current.without_graph == WARM_UP
    sums = [trainer.state.current.sums for trainer in (expected, found)]
    assert_close(*(each.by_name() for each in sums), rtol=1e-3, atol=1e-3)
    assert found.state.scheduler.state_dict() == expected.state.scheduler.state_dict()
    assert found.state.average.updates == 2 * WARM_UP


def test_a_broken_step_changes_nothing_and_is_counted(trainer_in, device, caplog):
    trainer = trainer_in("run", device=device, ema_decay=0.9)
    batches = batches_of(WARM_UP + 1, device)
    run(trainer, batches)
    before = tensors_of(trainer)
    assert not trainer.run_step([batch_of(2, 1, seed=7, device=device, spoilt=True)])["loss"].isfinite()
    assert differing(tensors_of(trainer), before) == []
    assert trainer.state.current.skipped == 0  # the host has not looked yet
    run(trainer, batches[:1])
    assert "the loss is not finite: step skipped; image ids [700, 701]" in caplog.text
    assert f"epoch 1, batches {WARM_UP + 2} to {WARM_UP + 2}" in caplog.text
    current = trainer.state.current
    assert (current.steps, current.skipped, current.batches) == (WARM_UP + 2, 1, WARM_UP + 3)
    assert trainer.state.average.updates == WARM_UP + 2
    assert current.sums.values.isfinite().all()
    assert len(differing(tensors_of(trainer), before)) > 100


def test_too_many_broken_steps_end_the_training(trainer_in):
    trainer = trainer_in("run", max_skipped_steps=0)
    trainer.run_step([batch_of(2, 1, spoilt=True)])
    with pytest.raises(TrainingError, match="1 steps of epoch 1 had a loss"):
        trainer.run_step([batch_of(2, 1)])


def test_an_epoch_counts_its_last_step(trainer_in):
    trainer = trainer_in("run", epochs=1, accumulate=2)
    (row,) = trainer.fit()["epochs"]
    assert (row["skipped_steps"], row["steps_without_graph"]) == (1, 3)
    assert all(math.isfinite(value) for value in row["train"].values())


def test_sizes_beyond_the_graphs_run_without(trainer_in, device, caplog):
    trainer = trainer_in("run", device=device, cuda_graphs=1)
    run(trainer, batches_of(WARM_UP + 2, device))
    current = trainer.state.current
    assert current.without_graph == WARM_UP
    run(trainer, batches_of(2, device, size=(96, 64)))
    assert caplog.text.count("all 1 graphs are taken, none is of") == 1
    run(trainer, [batch_of(9, 1, device=device)])
    assert "an image has 9 targets" in caplog.text
    assert (current.steps, current.without_graph) == (WARM_UP + 5, WARM_UP + 3)
    run(trainer, batches_of(2, device))
    assert (current.steps, current.without_graph) == (WARM_UP + 7, WARM_UP + 3)


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)])
def test_checkpoints_serve_runs_with_and_without_graphs(trainer_in, before, after):
    first = trainer_in("run", cuda_graphs=before, ema_decay=0.9)
    run(first, batches_of(WARM_UP + 2))
    first.save()
    second = trainer_in("run", cuda_graphs=after, ema_decay=0.9)
    assert second.resume()
    assert differing(tensors_of(first), tensors_of(second)) == []
    batches = batches_of(WARM_UP + 4)[WARM_UP + 2 :]
    torch.testing.assert_close(run(first, batches), run(second, batches), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_that_is_loaded_later_is_heeded(trainer_in, device):
    """Loading gives the optimiser other tensors, of which graphs that were captured before know nothing."""
    trainer = trainer_in("run", device=device)
    batches = batches_of(WARM_UP + 4, device)
    run(trainer, batches[: WARM_UP + 1])
    trainer.save()
    expected = run(trainer, batches[WARM_UP + 1 :]), tensors_of(trainer)
    assert trainer.resume()
    found = run(trainer, batches[WARM_UP + 1 :]), tensors_of(trainer)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert_close(found[1], expected[1], rtol=1e-2, atol=1e-3)
    assert trainer.state.current.without_graph == 2 * WARM_UP


def test_masks_of_targets_are_refused(trainer_in):
    batch = batch_of(1)
    masks = (torch.zeros(1, 64, 64, dtype=torch.bool),)
    with pytest.raises(ValueError, match="cuda_graphs are for detectors of boxes"):
        trainer_in("run").run_step([replace(batch, targets=replace(batch.targets, masks=masks))])


def test_without_a_gpu_graphs_are_refused(tmp_path):
    PartialState._reset_state()
    accelerator = build_accelerator(CONFIG, tmp_path, cpu=True)
    detector = build()
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=None, sampler=InOrder(Numbers()))
    with pytest.raises(ValueError, match="cuda_graphs need a CUDA GPU, and this training runs on cpu"):
        Trainer(accelerator, detector, gd.build_criterion(detector), loader, TrainerSettings(CONFIG, tmp_path))


@pytest.mark.parametrize(
    ("changes", "options", "observing", "message"),
    [
        ({"distributed_type": DistributedType.MULTI_GPU}, {}, False, "are for one process without DDP or FSDP"),
        ({"scaler": object()}, {}, False, "do not work with precision fp16"),
        ({}, {}, True, "do not work with observe"),
        ({}, {"groups_per_pass": 1}, False, "do not work with groups_per_pass=1"),
        ({}, {"recompute_layers": True}, False, "do not work with recompute_layers=True"),
        ({}, {"compile": True}, False, "do not work with compile=True"),
    ],
)
def test_what_the_host_has_a_part_in_is_refused(changes, options, observing, message):
    fitting = {"device": torch.device("cuda"), "distributed_type": DistributedType.NO, "scaler": None}
    check_graphs(SimpleNamespace(**fitting), CONFIG, observing=False)
    with pytest.raises(ValueError, match=f"cuda_graphs {message}"):
        check_graphs(SimpleNamespace(**fitting | changes), replace(CONFIG, **options), observing=observing)


class Chooser:
    """An observer that looks at every fifth batch."""

    def __init__(self):
        self.seen = []

    def wants(self, step):
        return step % 5 == 0

    def __call__(self, step, model, output, targets):
        self.seen.append((step, targets.max_targets))


def test_an_observer_that_chooses_gets_its_steps_without_a_graph(trainer_in):
    """The others are padded and replayed as without it, and all train as without graphs."""
    observe = Chooser()
    trainer = trainer_in("run", observe=observe)
    plain = trainer_in("plain", cuda_graphs=0)
    replayed = []
    for step in range(1, 12):
        batch = batch_of(1 + step % 4, seed=step)
        losses, expected = trainer.run_step([batch]), plain.run_step([batch])
        torch.testing.assert_close(losses["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
        replayed.append(trainer.ledger._enqueued.outcome.replayed)
    assert [step for step, _ in observe.seen] == [5, 10]
    assert [targets for _, targets in observe.seen] == [2, 3]  # as the batch has them: not padded
    assert replayed == [False] * WARM_UP + [True, False, True, True, True, True, False, True]
    assert trainer.state.current.without_graph == WARM_UP + 2


def test_only_an_observer_that_chooses_goes_with_graphs(trainer_in, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "check_graphs", lambda *arguments, observing: asked.append(observing))
    for observe in (None, Chooser(), lambda *_: None):
        trainer_in("run", observe=observe)
    assert asked == [False, False, True]


# --- On a GPU ---


@pytest.fixture
def deterministic():
    """Operators that give the same result each time, as far as torch has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


STEPS = 20


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="float32"),
        pytest.param({"precision": "bf16", "ema_decay": 0.9}, id="bf16"),
        pytest.param({"overrides": {"dropout": 0.1}, "decay": "cosine", "warmup_steps": 4}, id="dropout"),
    ],
)
def test_captured_steps_are_bit_for_bit_those_uncaptured(trainer_in, deterministic, options):
    batches = batches_of(STEPS, "cuda")
    expected = uncaptured(trainer_in("uncaptured", device="cuda", **options))
    losses = run(expected, batches)
    found = trainer_in("captured", device="cuda", **options)
    assert torch.equal(run(found, batches), losses)
    assert differing(tensors_of(found), tensors_of(expected)) == []
    assert (found.state.current.without_graph, expected.state.current.without_graph) == (WARM_UP, STEPS)


@pytest.mark.gpu
@pytest.mark.parametrize("denoising_queries", [0, 12])
def test_captured_steps_of_dino_are_those_uncaptured(trainer_in, denoising_queries):
    """Up to the order of the sums of deformable attention, which differs from run to run."""
    options = {"device": "cuda", "model": DINO, "overrides": {"denoising_queries": denoising_queries}}
    batches = batches_of(STEPS, "cuda")
    expected = run(uncaptured(trainer_in("uncaptured", **options)), batches)
    found = trainer_in("captured", **options)
    losses = run(found, batches)
    assert found.state.current.without_graph == WARM_UP
    torch.testing.assert_close(losses[: WARM_UP + 4], expected[: WARM_UP + 4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses, expected, rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "overrides"), [(CONDITIONAL, {"dropout": 0.3}), (DINO, {"denoising_queries": 12})])
def test_replays_draw_new_numbers(trainer_in, model, overrides):
    """Dropout and denoising noise, with weights that do not change."""
    trainer = trainer_in("run", device="cuda", model=model, overrides=overrides, lr=0.0, backbone_lr=0.0)
    losses = run(trainer, [batch_of(2, 3, device="cuda")] * (WARM_UP + 6))
    assert trainer.state.current.without_graph == WARM_UP
    assert len(set(losses[WARM_UP:].tolist())) == 6
    torch.manual_seed(1)
    first = run(trainer, [batch_of(2, 3, device="cuda")])
    torch.manual_seed(1)
    torch.testing.assert_close(run(trainer, [batch_of(2, 3, device="cuda")]), first, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_graphs_of_two_sizes_take_turns(trainer_in, deterministic):
    """They share memory, and each goes on from what the other has done."""
    small, large = batches_of(STEPS, "cuda"), batches_of(STEPS, "cuda", size=(128, 96))
    batches = [batch for pair in zip(small, large, strict=True) for batch in pair]
    expected = uncaptured(trainer_in("uncaptured", device="cuda", ema_decay=0.9))
    losses = run(expected, batches)
    found = trainer_in("captured", device="cuda", ema_decay=0.9)
    assert torch.equal(run(found, batches), losses)
    assert differing(tensors_of(found), tensors_of(expected)) == []
    assert found.state.current.without_graph == 2 * WARM_UP


@pytest.mark.gpu
def test_accumulated_steps_are_one_graph(trainer_in, deterministic):
    batches = batches_of(2 * STEPS, "cuda")
    steps = list(zip(batches[::2], batches[1::2], strict=True))
    trainers = [uncaptured(trainer_in("uncaptured", device="cuda", accumulate=2))]
    trainers.append(trainer_in("captured", device="cuda", accumulate=2))
    for trainer in trainers:
        for step in steps:
            trainer.run_step(list(step))
        trainer.ledger.settle()
    assert differing(tensors_of(trainers[1]), tensors_of(trainers[0])) == []
    assert trainers[1].state.current.without_graph == WARM_UP


@pytest.mark.gpu
def test_a_replay_does_not_wait(trainer_in):
    trainer = trainer_in("run", device="cuda", model=DINO, overrides={"dropout": 0.1}, ema_decay=0.9)
    batches = batches_of(WARM_UP + 6, "cuda")
    run(trainer, batches[: WARM_UP + 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[WARM_UP + 1 :]:
            assert trainer.graphs.run([batch]).replayed
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_frozen_parts_stay_in_captured_steps(trainer_in):
    trainer = uncaptured(trainer_in("run", freeze=("encoder",), ema_decay=0.9))
    before = tensors_of(trainer)
    run(trainer, batches_of(2))
    after = tensors_of(trainer)
    moved = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith("model.encoder.")]
    assert not [
        name for name in differing(before, {name: after[name] for name in before}) if "average.encoder." in name
    ]
