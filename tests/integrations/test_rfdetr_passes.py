"""RF-DETR's training step with some groups at a time against the same step with all groups at once."""

import contextlib
import copy
import json
import pickle
from unittest import mock

import pytest
import torch

pytest.importorskip("rfdetr", reason="rfdetr is not installed")
pytest.importorskip("pytorch_lightning", reason="what rfdetr needs for training is not installed: rfdetr[train]")

import pytorch_lightning as lightning
from rfdetr import training
from rfdetr.models.backbone import Joiner
from rfdetr.models.lwdetr import LWDETR
from test_rfdetr import COUNTS, assert_same_step, attention, step
from tiny_rfdetr import QUERIES, SIZE, batch_of, detector_of, module_of, tiny_backbones

from groupdetr_fast.integrations.rfdetr import accelerate, acceleration, passes, restore
from groupdetr_fast.testing import peak_bytes

pytestmark = pytest.mark.skipif(not attention.DEVICES, reason="groupdetr_fast was built without its kernels")


@pytest.fixture(autouse=True)
def _any_version(monkeypatch):
    monkeypatch.setattr(acceleration, "_VERSION", "1.11.2")


@pytest.fixture
def seen(monkeypatch):
    """How many groups each pass had."""
    groups = []
    with_groups = passes._with_groups

    def spy(model, features, first, count):
        groups.append(count)
        return with_groups(model, features, first, count)

    monkeypatch.setattr(passes, "_with_groups", spy)
    return groups


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("num_groups", "groups_per_pass", "expected_groups"), [(1, 1, [1]), (13, 5, [5, 5, 3])])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_a_step_in_passes_is_the_step(dtype, tolerance, num_groups, groups_per_pass, expected_groups, counts, seen):
    batch = batch_of(counts, dtype=dtype)
    expected = step(module_of(num_groups, dtype), batch)
    module = accelerate(module_of(num_groups, dtype), groups_per_pass=groups_per_pass)
    assert_same_step(step(module, batch), expected, tolerance)
    assert seen == expected_groups


@pytest.mark.parametrize(
    "options",
    [
        {"two_stage": False},
        {"bbox_reparam": False},
        {"lite_refpoint_refine": False},
        {"projector_scale": ["P3", "P4"]},
        {"freeze_encoder": True},
        {"gradient_checkpointing": True},
        {"ia_bce_loss": False},
    ],
    ids=str,
)
def test_options_of_the_model(options):
    batch = batch_of((3, 1), dtype=torch.float64)
    expected = step(module_of(3, torch.float64, **options), batch)
    module = accelerate(module_of(3, torch.float64, **options), groups_per_pass=1)
    if options == {"two_stage": False}:
        assert not any("enc" in name for name in step(module, batch)[0])
    assert_same_step(step(module, batch), expected, 1e-9)


def test_targets_that_are_left_to_their_criterion():
    images, targets = batch_of((3, 1), dtype=torch.float64)
    targets[0]["boxes"][0, 0] = 1.3
    expected = step(module_of(3, torch.float64), (images, targets))
    module = accelerate(module_of(3, torch.float64), groups_per_pass=1)
    assert_same_step(step(module, (images, targets)), expected, 1e-9)


def test_frozen_parameters_get_no_gradient():
    module = accelerate(module_of(3), groups_per_pass=1)
    module.model.class_embed.requires_grad_(False)
    module.model.backbone.requires_grad_(False)
    _, gradients = step(module, batch_of((3, 1)))
    assert not any(name.startswith(("model.class_embed", "model.backbone")) for name in gradients)
    assert "model.query_feat.weight" in gradients


def test_small_images_go_in_one_pass(seen):
    """With 16 proposals for 20 queries RF-DETR hands proposals from group to group."""
    batch = batch_of((3, 1), dtype=torch.float64)
    expected = step(module_of(3, torch.float64, num_queries=20), batch)
    module = accelerate(module_of(3, torch.float64, num_queries=20), groups_per_pass=1)
    assert_same_step(step(module, batch), expected, 1e-9)
    assert seen == [3]


def test_predictions_for_metrics_of_training():
    """They are those of the first group."""
    options = {"train_options": {"compute_train_metrics": True}}
    batch = batch_of((3, 1), dtype=torch.float64)
    expected = module_of(3, torch.float64, **options).training_step(batch, 0)
    found = accelerate(module_of(3, torch.float64, **options), groups_per_pass=1).training_step(batch, 0)
    torch.testing.assert_close(found["results"], expected["results"])
    assert found["results"][0]["boxes"].shape == (QUERIES, 4)
    assert not found["results"][0]["boxes"].requires_grad


def test_one_backward_pass():
    module = accelerate(module_of(3), groups_per_pass=1)
    loss = module.training_step(batch_of((3, 1)), 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a step in passes has one backward pass"):
        loss.backward()


def test_without_gradients():
    module, batch = accelerate(module_of(3), groups_per_pass=1), batch_of((3, 1))
    with torch.no_grad(), mock.patch.object(torch.autograd, "grad", None):
        found = module.training_step(batch, 0)
    torch.testing.assert_close(found, module_of(3).training_step(batch, 0).detach(), rtol=1e-5, atol=1e-5)


def test_the_training_step_leaves_no_trace(monkeypatch):
    module = accelerate(module_of(3), groups_per_pass=1)
    names = set(vars(module))
    step(module, batch_of((3, 1)))
    assert set(vars(module)) == names
    assert isinstance(module.model, LWDETR)
    monkeypatch.setattr(Joiner, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.training_step(batch_of((3, 1)), 0)
    assert set(vars(module)) == names


def test_copies_and_pickles_keep_the_passes(seen):
    module, batch = accelerate(module_of(3), groups_per_pass=2), batch_of((3, 1))
    expected = step(module, batch)
    del module.log, module.log_dict  # functions of this test, which cannot be pickled
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.log = lambda *args, **kwargs: None
        assert_same_step(step(other, batch), expected, 1e-6)
    assert seen == [2, 1] * 3
    other = restore(other)
    assert_same_step(step(other, batch), expected, 1e-5)
    assert len(seen) == 6
    assert type(accelerate(accelerate(other, groups_per_pass=1))) is training.RFDETRModelModule


def test_scaled_and_accumulated_gradients():
    """Two batches, each with its share of the loss, as Lightning accumulates them, and with a scaled loss."""
    batches = [batch_of((3, 1), dtype=torch.float64), batch_of((2, 4), dtype=torch.float64)]

    def gradients_of(module):
        for batch in batches:
            (1024 * module.training_step(batch, 0) / 2).backward()
        return [parameter.grad for parameter in module.parameters()]

    expected = gradients_of(module_of(3, torch.float64))
    found = gradients_of(accelerate(module_of(3, torch.float64), groups_per_pass=1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Half types round, here in other places: losses and gradients agree as far as they do with float32's."""
    batch = batch_of((3, 1))

    def step_of(module):
        with torch.autocast("cpu", dtype):
            loss = module.training_step(batch, 0)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    loss, gradient = step_of(accelerate(module_of(3), groups_per_pass=1))
    all_loss, all_gradient = step_of(accelerate(module_of(3)))
    torch.testing.assert_close(loss, all_loss, rtol=2e-2, atol=0)
    assert torch.nn.functional.cosine_similarity(gradient, all_gradient, dim=0) > 0.99


def trainer_of(tmp_path, **options):
    return lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(module, tmp_path, **options):
    """Parameters after four batches under Lightning."""
    del module.log, module.log_dict
    batches = [batch_of(counts) for counts in ((3, 1), (2,), (1, 2, 0), (4, 4))]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-3)
    trainer_of(tmp_path, max_epochs=1, **options).fit(module, loader)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_lightning(options, tmp_path, seen):
    start = torch.cat([parameter.detach().flatten() for parameter in module_of(3).parameters()])
    expected = fit(module_of(3), tmp_path, **options)
    found = fit(accelerate(module_of(3), groups_per_pass=1), tmp_path, **options)
    assert seen == [1] * 12
    moved = (expected - start).abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * moved)


def test_the_scale_of_a_grad_scaler(tmp_path, monkeypatch):
    """In float16 small gradients would be lost inside of the passes, if these did not begin with the scale."""
    starts = []
    step_in_passes = passes.GroupPasses.__call__

    def spy(self, *args):
        starts.append(float(self.start))
        return step_in_passes(self, *args)

    monkeypatch.setattr(passes.GroupPasses, "__call__", spy)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(accelerate(module_of(3), groups_per_pass=1), tmp_path, plugins=[plugin])
    assert starts == [512.0] * 4
    assert scaler.get_scale() == 512.0  # no step was skipped


class Step(torch.nn.Module):
    """What DDP wraps under Lightning: a module whose forward pass is the training step."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.training_step(batch, 0)


def compare_under_ddp(rank, processes, rendezvous):
    """Gradients of one of the processes, each of which has its own images, with passes and without."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    try:
        batch = batch_of([(3, 1), (0, 5)][rank], dtype=torch.float64)

        def gradients_of(module):
            wrapped = torch.nn.parallel.DistributedDataParallel(Step(module), find_unused_parameters=True)
            for _ in range(2):
                wrapped.zero_grad()
                wrapped(batch).backward()
            return [parameter.grad for parameter in module.parameters()]

        expected = gradients_of(module_of(3, torch.float64))
        found = gradients_of(accelerate(module_of(3, torch.float64), groups_per_pass=1))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    finally:
        torch.distributed.destroy_process_group()


def test_small_gradients_survive_in_float16():
    """Because those inside of the passes begin with the scale of the loss."""

    def gradient_of(scale):
        module, (images, targets) = accelerate(module_of(3)), batch_of((3, 1))
        weights = module.criterion.weight_dict = dict.fromkeys(module.criterion.weight_dict, 1e-07)
        step = passes.GroupPasses(module.model, module.criterion, 1, scale)
        with torch.autocast("cpu", torch.float16):
            losses = step(step.encode(images), targets)
        (scale * sum(losses[name] * weight for name, weight in weights.items())).backward()
        return module.model.class_embed.weight.grad / scale

    with mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()):
        expected = gradient_of(1.0)
    assert torch.nn.functional.cosine_similarity(gradient_of(1e6).flatten(), expected.flatten(), dim=0) > 0.99
    assert (gradient_of(1.0) == 0).float().mean() > 0.5


def test_distributed_data_parallel(tmp_path):
    """DDP still sees every gradient once, as it also looks for parameters that have none."""
    compare_under_ddp(0, 1, tmp_path / "rendezvous")


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(compare_under_ddp, (2, tmp_path / "rendezvous"), nprocs=2)


def write_dataset(folder):
    """Noise with two objects an image, in Roboflow's layout of COCO."""
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    categories = [{"id": index + 1, "name": name, "supercategory": "thing"} for index, name in enumerate("ab")]
    generator = numpy.random.default_rng(0)
    for split, count in (("train", 4), ("valid", 2), ("test", 2)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            pixels = generator.integers(0, 255, (SIZE, SIZE, 3), dtype=numpy.uint8)
            image.fromarray(pixels).save(folder / split / f"{index}.jpg")
            images.append({"id": index, "file_name": f"{index}.jpg", "width": SIZE, "height": SIZE})
            for category in (1, 2):
                box = {"bbox": [10 * category, 8, 20, 25], "area": 500, "iscrowd": 0}
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": index, "category_id": category, **box},
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def peak_of(groups_per_pass, num_groups, batch, **options):
    module = module_of(num_groups, **options)
    if groups_per_pass:
        accelerate(module, groups_per_pass=groups_per_pass)
    step(module, batch)
    module.zero_grad()
    return peak_bytes(lambda: module.training_step(batch, 0).backward())


def test_memory_does_not_grow_with_groups():
    batch = batch_of((3, 1), size=128)
    one, all_at_once, in_passes = (
        peak_of(passes, groups, batch, num_queries=60) for passes, groups in ((None, 1), (None, 13), (1, 13))
    )
    assert in_passes - one < 0.15 * (all_at_once - one)


@pytest.mark.slow
def test_memory_of_the_smallest_published_model():
    """13 groups, one at a time, take at most 1.2 times the memory of one group."""
    batch = batch_of((7, 7), size=384)
    one, in_passes = (peak_of(passes, groups, batch, tiny=False) for passes, groups in ((None, 1), (1, 13)))
    assert in_passes < 1.2 * one


def test_train(tmp_path, seen):
    """``RFDETR.train`` itself, with its data, callbacks, EMA, validation and checkpoints."""
    pytest.importorskip("vernier", reason="RF-DETR's validation needs vernier: rfdetr[train]")
    write_dataset(tmp_path / "data")

    def trained(detector, name):
        torch.manual_seed(0)
        options = {"epochs": 1, "batch_size": 2, "num_workers": 0, "multi_scale": False, "tensorboard": False}
        with tiny_backbones():
            detector.train(
                dataset_dir=str(tmp_path / "data"), output_dir=str(tmp_path / name), device="cpu", seed=0, **options
            )
        return torch.cat([parameter.detach().flatten() for parameter in detector.model.model.parameters()])

    expected = trained(detector_of(3), "theirs")
    assert not seen
    detector = accelerate(detector_of(3), groups_per_pass=1)
    found = trained(detector, "ours")
    assert len(seen) >= 6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert training.RFDETRModelModule.__module__ == "rfdetr.training.module_model"
    assert any(attention.is_exchanged(part) for part in detector.model.model.modules())
    restore(detector)
    assert not any(attention.is_exchanged(part) for part in detector.model.model.modules())
    theirs, ours = (torch.load(tmp_path / n / "last.ckpt", weights_only=False) for n in ("theirs", "ours"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])


def test_train_accelerates_the_module_that_it_builds(monkeypatch):
    built = []

    def train(self, fail):
        built.append(training.RFDETRModelModule(*fail))

    detector = accelerate(detector_of(3), groups_per_pass=2)
    other = copy.deepcopy(detector)
    monkeypatch.setattr(type(detector), "train", train)
    build = training.RFDETRModelModule
    for each in (detector, other):
        with tiny_backbones():
            module = module_of(3)
            each.train((module.model_config, module.train_config))
        assert built[-1].groups_per_pass == 2
        assert training.RFDETRModelModule is build
    with pytest.raises(TypeError):
        detector.train(())
    assert training.RFDETRModelModule is build
    restore(detector)
    assert "train" not in vars(detector)


def test_what_is_refused():
    with pytest.raises(ValueError, match="groups_per_pass does not work with segmentation_head=True"):
        accelerate(module_of(3, segmentation_head=True), groups_per_pass=1)
    for name in ("compile", "cuda_graphs"):
        with pytest.raises(ValueError, match=f"groups_per_pass does not work with {name}=True"):
            accelerate(module_of(3, **{name: True}), groups_per_pass=1)
        with pytest.raises(ValueError, match=f"groups_per_pass does not work with {name}=True"):
            accelerate(detector_of(3, **{name: True}), groups_per_pass=1)

    class OtherModule(training.RFDETRModelModule):
        pass

    module = module_of(3)
    module.__class__ = OtherModule
    with pytest.raises(TypeError, match="needs an RFDETRModelModule itself, got its subclass OtherModule"):
        accelerate(module, groups_per_pass=1)
