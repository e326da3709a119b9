"""Ultralytics' RT-DETR with this package's kernels against the untouched one."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny_ultralytics import (
    CLASSES,
    COUNTS,
    QUERIES,
    SIZE,
    assert_same_step,
    batch_of,
    folder_of,
    model_of,
    options_of,
    step,
    train,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from ultralytics import RTDETR
from ultralytics.engine.model import Model
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn.modules.transformer import MSDeformAttn
from ultralytics.nn.tasks import RTDETRDetectionModel, torch_safe_load
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file
from ultralytics.utils.loss import VarifocalLoss
from ultralytics.utils.patches import torch_load

from groupdetr_fast import load_model, ops
from groupdetr_fast.integrations import kernels
from groupdetr_fast.integrations.ultralytics import (
    AcceleratedTrainer,
    accelerate,
    attention,
    group_trainer,
    parts,
    restore,
)
from groupdetr_fast.integrations.ultralytics import criterion as criteria

LAYERS = 4

pytestmark = pytest.mark.skipif(not attention.DEVICES, reason="groupdetr_fast was built without its kernels")


@pytest.fixture(autouse=True)
def _any_version(monkeypatch):
    """The tests say whether another version works, too."""
    monkeypatch.setattr(parts, "__version__", "8.4.190")


@pytest.fixture
def default_dtype():
    """A function that sets it: Ultralytics' losses run in no other."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def exchanged_of(model):
    return [part for part in model.modules() if attention.is_exchanged(part) or criteria.is_exchanged(part)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("denoising", [0, 10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 5e-7)], ids=str)
def test_a_step_stays_the_same(dtype, tolerance, denoising, counts, default_dtype):
    """In float64 as well as it goes: Ultralytics computes its class loss in float32."""
    default_dtype(dtype)
    batch = batch_of(counts, dtype)
    expected = step(model_of(dtype, denoising=denoising), batch)
    model = accelerate(model_of(dtype, denoising=denoising))
    assert len(exchanged_of(model)) == 4  # the model, and the attention of three layers
    assert_same_step(step(model, batch), expected, tolerance)
    assert len(exchanged_of(model)) == 5


def test_ops_are_what_runs(monkeypatch):
    calls = []
    for name in ("ms_deform_attn", "matching_cost", "linear_assignment", "sigmoid_focal_loss"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, run=run, name=name, **kw: calls.append(name) or run(*args, **kw))
    step(accelerate(model_of()), batch_of((3, 1)))
    losses = ["linear_assignment", "matching_cost", "sigmoid_focal_loss", "sigmoid_focal_loss"]  # denoising, too
    assert sorted(calls) == sorted([*losses, *3 * ["ms_deform_attn"]])
    step(restore(accelerate(model_of())), batch_of((3, 1)))
    assert len(calls) == 7


def test_fewer_positions_than_queries():
    batch = batch_of((3, 1))
    expected = step(model_of(queries=100), batch)
    assert_same_step(step(accelerate(model_of(queries=100)), batch), expected, 1e-5)


def test_evaluation(default_dtype):
    default_dtype(torch.float64)
    batch = batch_of((3, 1), torch.float64)
    theirs, ours = model_of(torch.float64).eval(), accelerate(model_of(torch.float64)).eval()
    with torch.no_grad():
        expected, found = theirs(batch["img"]), ours(batch["img"])
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(ours.loss(batch, found), theirs.loss(batch, expected), rtol=5e-7, atol=5e-7)


def test_half_precision_of_autocast(monkeypatch):
    """Losses are those of float32 of the same outputs, which Ultralytics' own, in half types, only approach."""
    kept = []

    def loss_of(model):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            return model(dict(batch_of((3, 1))))[0]

    model = accelerate(model_of())
    forward = RTDETRDetectionLoss.forward
    monkeypatch.setattr(
        RTDETRDetectionLoss, "forward", lambda *args, **kw: kept.append((args[1:], kw)) or forward(*args, **kw)
    )
    found = loss_of(model)
    found.backward()
    (((scores, targets), options),) = kept
    assert scores[1].dtype == torch.bfloat16
    in_full = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    expected = sum(model_of().init_criterion()(tuple(x.float() for x in scores), targets, **in_full).values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, loss_of(model_of()), rtol=2e-2, atol=0, check_dtype=False)


def outputs_of(counts, queries=QUERIES, size=0.5):
    """Random predictions of all layers, and targets as the model hands them to its criterion."""
    generator = torch.Generator().manual_seed(4)
    shape = (LAYERS, len(counts), queries)
    logits = 2 * torch.randn(*shape, CLASSES, generator=generator) - 1
    boxes = torch.rand(*shape, 4, generator=generator) * torch.tensor([1, 1, size, size])
    batch = batch_of(counts)
    batch["bboxes"][:, 2:] *= size
    targets = {"cls": batch["cls"].long().view(-1), "bboxes": batch["bboxes"], "gt_groups": list(counts)}
    return (boxes.requires_grad_(), logits.requires_grad_()), targets


def losses_and_gradients(criterion, outputs, targets):
    losses = criterion(outputs, targets)
    return losses, torch.autograd.grad(sum(losses.values()), outputs, materialize_grads=True)


def criterion_of(**options):
    return RTDETRDetectionLoss(nc=CLASSES, **{"use_vfl": True, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 2.0, "alpha": 0.4}, {"loss_gain": {"class": 2, "bbox": 3, "giou": 1}}],
    ids=str,
)
@pytest.mark.parametrize("size", [0.5, 0.01])  # areas of boxes to 1e-7, which is what Ultralytics adds
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_losses(counts, size, options, monkeypatch):
    outputs, targets = outputs_of(counts, size=size)
    expected = losses_and_gradients(criterion_of(**options), outputs, targets)
    ours = criterion_of(**options)
    assert criteria.exchange(ours)
    monkeypatch.setattr(RTDETRDetectionLoss, "_get_loss", None)
    losses, gradients = losses_and_gradients(ours, outputs, targets)
    assert list(losses) == list(expected[0])
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in expected[1]).item()
    torch.testing.assert_close(gradients, expected[1], rtol=1e-5, atol=1e-6 * max(largest, 1))


class OtherVarifocalLoss(VarifocalLoss):
    pass


def other_loss():
    criterion = criterion_of()
    criterion.vfl = OtherVarifocalLoss(1.5, 0.25)
    return criterion


def other_cost():
    criterion = criterion_of()
    criterion.matcher.use_fl = False
    return criterion


def hooked():
    criterion = criterion_of()
    criterion.matcher.register_forward_hook(lambda *args: None)
    return criterion


@pytest.mark.parametrize(
    "build",
    [
        lambda: criterion_of(use_vfl=False),
        lambda: criterion_of(use_fl=False),
        lambda: criterion_of(aux_loss=False),
        lambda: criterion_of(use_uni_match=True),
        other_loss,
        other_cost,
        hooked,
    ],
)
def test_options_that_are_left_to_them(build):
    outputs, targets = outputs_of((3, 1))
    expected = losses_and_gradients(build(), outputs, targets)
    ours = build()
    assert criteria.exchange(ours)
    torch.testing.assert_close(losses_and_gradients(ours, outputs, targets), expected, rtol=0, atol=0)


def test_a_device_without_a_kernel_is_left_to_them(monkeypatch):
    """Where the op would run its reference."""
    asked = []
    monkeypatch.setattr(criteria, "serves", lambda op, device: asked.append((op, device.type)))
    outputs, targets = outputs_of((3, 1))
    expected = losses_and_gradients(criterion_of(), outputs, targets)
    ours = criterion_of()
    assert criteria.exchange(ours)
    torch.testing.assert_close(losses_and_gradients(ours, outputs, targets), expected, rtol=0, atol=0)
    assert set(asked) == {("linear_assignment", "cpu")}


def test_which_devices_have_a_kernel():
    assert kernels.serves("linear_assignment", torch.device("cpu"))
    assert not any(kernels.serves("linear_assignment", torch.device(name)) for name in ("mps", "xpu", "meta"))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + kernels.serves("linear_assignment", x.device), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(1)).item() == 1


def test_a_label_beyond_the_classes_is_named():
    outputs, targets = outputs_of((3, 1))
    targets["cls"][3] = CLASSES
    ours = criterion_of()
    criteria.exchange(ours)
    with pytest.raises(ValueError, match=r"targets\[1\], row 0: the label 4 is not in 0 ... 3, the model's classes"):
        ours(outputs, targets)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention(coordinates, monkeypatch):
    """Also with padding; their own code runs without a kernel, and in traces."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[5, 7], [3, 4]]
    module = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    query = torch.randn(2, 6, 32, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 6, 1, coordinates, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 47, 32, generator=generator, dtype=torch.float64)
    padding = torch.arange(47) > torch.tensor([[46], [40]])
    inputs = [query, points, memory]

    def run():
        tensors = [tensor.requires_grad_() for tensor in inputs]
        out = module(*tensors, shapes, padding)
        return out, *torch.autograd.grad(out.square().sum(), [*tensors, *module.parameters()])

    expected = run()
    assert attention.exchange(module)
    torch.testing.assert_close(run(), expected)
    monkeypatch.setattr(ops, "ms_deform_attn", None)
    with pytest.raises(TypeError):
        run()
    monkeypatch.setattr(attention, "has_kernel", lambda device: False)
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    monkeypatch.setattr(attention, "has_kernel", lambda device: True)
    module.requires_grad_(False)
    inputs = [tensor.detach() for tensor in inputs]
    traced = torch.jit.trace(lambda *tensors: module(*tensors, shapes, padding), inputs, check_trace=False)
    torch.testing.assert_close(traced(*inputs), expected[0])


def test_restore_gives_back_the_model():
    untouched, model = model_of(), model_of()
    accelerate(accelerate(model))
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert isinstance(model, RTDETRDetectionModel)
    step(model, batch_of((3, 1)))
    step(untouched, batch_of((3, 1)))
    restore(restore(model))
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert set(vars(ours)) == set(vars(theirs))


def test_shallow_copies_stay_accelerated():
    for model in accelerate(model_of()).modules():
        twin = copy.copy(model)
        assert type(twin) is type(model)
        assert vars(twin) == vars(model)


def test_a_module_that_is_given_another_class():
    """As torch's fully_shard does, which makes a subclass of what it sees."""
    model = accelerate(model_of())
    attended = model.model[-1].decoder.layers[0].cross_attn
    for module in (model, attended):
        cls = type("Sharded", (module.__class__,), {})
        module.__class__ = cls
        assert type(module) is cls
    model.model[-1].decoder.layers[1].cross_attn.__class__ = MSDeformAttn
    assert len(exchanged_of(model)) == 1
    assert_same_step(step(model, batch_of((3, 1))), step(model_of(), batch_of((3, 1))), 1e-5)


def test_fully_shard(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(accelerate(model_of()), mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(model, RTDETRDetectionModel)
        assert not criteria.is_exchanged(model)
    finally:
        dist.destroy_process_group()


def test_copies_stay_accelerated():
    model, batch = accelerate(model_of()), batch_of((3, 1))
    expected = step(model, batch)
    twin = copy.deepcopy(model)
    assert len(exchanged_of(twin)) == 5
    assert_same_step(step(twin, batch), expected, 1e-6)
    assert all(ours is not other for ours, other in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_have_their_classes(protocol):
    model, batch = accelerate(model_of()), batch_of((3, 1))
    expected = step(model, batch)
    data = pickle.dumps(model, protocol)
    assert b"groupdetr_fast" not in data
    again = pickle.loads(data)
    assert [type(part) for part in again.modules()] == [type(part) for part in restore(model).modules()]
    assert_same_step(step(again, batch), expected, 1e-5)


class OtherModel(RTDETRDetectionModel):
    pass


def test_subclasses_are_left_alone():
    model = model_of()
    model.__class__ = OtherModel
    assert len(exchanged_of(accelerate(model))) == 3
    assert type(restore(model)) is OtherModel


@pytest.mark.parametrize("version", ["8.3.900", "8.4.0", "8.4.189", "8.5.0", "9.0.0"])
def test_other_versions_are_left_alone(version, monkeypatch):
    monkeypatch.setattr(parts, "__version__", version)
    model = model_of()
    match = rf"tested with ultralytics 8.4.190 to 8.4.\*, not {version}: the model is unchanged"
    with pytest.warns(UserWarning, match=match) as warned:
        assert accelerate(model) is model
    assert warned[0].filename == __file__  # where the user called
    assert not exchanged_of(model)


@pytest.mark.parametrize("version", ["8.4.190", "8.4.191", "8.4.1000"])
def test_later_versions_of_the_tested_minor_one_are_accelerated(version, monkeypatch):
    monkeypatch.setattr(parts, "__version__", version)
    assert exchanged_of(accelerate(model_of()))


def test_without_kernels_the_model_is_left_alone(monkeypatch):
    references = {"cpu": "reference", "cuda": "reference"}
    monkeypatch.setattr(ops.serving, "kinds_of", lambda op: references)
    monkeypatch.setattr(attention, "DEVICES", frozenset())  # which is read once, when the module is imported
    model = model_of()
    with pytest.warns(UserWarning, match="without its compiled kernels: the model is unchanged"):
        accelerate(model)
    assert not exchanged_of(model)


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be an RTDETR of a .pt or .yaml file, or a module, got str"):
        accelerate("rtdetr-l.pt")
    exported = RTDETR(folder_of(tmp_path) / "rtdetr-tiny.yaml")
    del exported.model
    exported.model = "rtdetr-l.onnx"
    with pytest.raises(TypeError, match=r"or a module, got an RTDETR of rtdetr-l.onnx"):
        accelerate(exported)
    with pytest.raises(ValueError, match="Linear has neither Ultralytics' deformable attention nor its RT-DETR"):
        accelerate(torch.nn.Linear(1, 1))


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path)


def test_training(folder, monkeypatch):
    """An epoch with and without, and what its checkpoints hold."""
    expected, theirs = train(folder, "theirs")
    calls = []
    run = ops.linear_assignment
    monkeypatch.setattr(ops, "linear_assignment", lambda *args: calls.append(args) or run(*args))
    found, ours = train(folder, "ours", trainer=AcceleratedTrainer)
    assert len(found) == 2
    assert len(calls) == 3  # and the batch of validation, by averaged weights that are accelerated, too
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert type(ours.trainer) is AcceleratedTrainer
    assert len(exchanged_of(ours.trainer.ema.ema)) == 5
    assert ours.metrics.results_dict.keys() == theirs.metrics.results_dict.keys()
    for name in ("best", "last"):
        path = folder / "runs" / "ours" / "weights" / f"{name}.pt"
        checkpoint, _ = torch_safe_load(path, safe_only=True)  # which takes Ultralytics' own classes alone
        other = torch_load(folder / "runs" / "theirs" / "weights" / f"{name}.pt", map_location="cpu")
        assert [type(part) for part in checkpoint["model"].modules()] == [
            type(part) for part in other["model"].modules()
        ]
        torch.testing.assert_close(
            checkpoint["model"].float().state_dict(), other["model"].float().state_dict(), rtol=2e-3, atol=1e-4
        )


def test_checkpoints_load_without_this_package(folder):
    train(folder, "ours", trainer=AcceleratedTrainer)
    code = (
        "import sys\n"
        "sys.modules['groupdetr_fast'] = None\n"
        "import torch\n"
        "from ultralytics import RTDETR\n"
        f"result, = RTDETR(sys.argv[1])(torch.zeros(1, 3, {SIZE}, {SIZE}), conf=0.0, verbose=False)\n"
        "print(len(result.boxes))\n"
    )
    best = folder / "runs" / "ours" / "weights" / "best.pt"
    with pytest.raises(ValueError, match=r"checkpoint \S*best.pt is a model of Ultralytics \(.* run in Ultralytics'"):
        load_model(best)
    done = subprocess.run([sys.executable, "-c", code, best], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


def test_an_accelerated_rtdetr_trains_with_the_trainer(folder):
    detector = RTDETR(str(folder / "rtdetr-tiny.yaml"))
    assert accelerate(detector) is detector
    assert isinstance(detector, RTDETR)
    detector.train(**options_of(folder, "run"), epochs=1)
    assert type(detector.trainer) is AcceleratedTrainer
    assert len(exchanged_of(detector.model)) == 4  # which was read from best.pt
    image = torch.rand(1, 3, SIZE, SIZE)
    (found,) = detector.predict(image, conf=0.0, verbose=False)
    (expected,) = restore(detector).predict(image, conf=0.0, verbose=False)
    torch.testing.assert_close(found.boxes.data, expected.boxes.data, rtol=1e-4, atol=1e-3)
    assert type(detector) is RTDETR
    assert not exchanged_of(detector.model)
    detector.train(**options_of(folder, "again"), epochs=1)
    assert type(detector.trainer) is RTDETRTrainer


def test_resuming(folder):
    """A training that was stopped after its first epoch ends as theirs does that was stopped there."""

    def stop(trainer):
        trainer.stop = trainer.epoch == 0
        trainer.final_eval = lambda: None  # which would take what is needed to go on out of the checkpoint

    losses = {}
    for name, trainer in (("theirs", RTDETRTrainer), ("ours", AcceleratedTrainer)):
        detector = RTDETR(str(folder / "rtdetr-tiny.yaml"))
        detector.add_callback("on_fit_epoch_end", stop)
        detector.train(**options_of(folder, name), epochs=2, trainer=trainer)
        losses[name], detector = train(
            folder, name, model=f"runs/{name}/weights/last.pt", resume=True, trainer=trainer, epochs=2
        )
        assert detector.trainer.start_epoch == 1
    assert len(losses["ours"]) == 2
    torch.testing.assert_close(losses["ours"], losses["theirs"], rtol=1e-3, atol=1e-4)


def test_what_processes_of_ddp_start_from(folder):
    """Ultralytics hands class, arguments and model to them as a pickle; the model is accelerated there."""
    overrides = {**options_of(folder, "run"), "model": str(folder / "rtdetr-tiny.yaml"), "epochs": 1}
    trainer = AcceleratedTrainer(overrides=overrides)
    trainer.model = accelerate(model_of())
    script = generate_ddp_file(trainer)
    try:
        state = torch_load(script.replace(".py", ".pt"), map_location="cpu")
    finally:
        ddp_cleanup(trainer, script)
    assert state["trainer"] is AcceleratedTrainer
    assert not exchanged_of(state["model"])
    again = state["trainer"](overrides=state["args"])
    again.model = state["model"]
    again.setup_model()
    assert len(exchanged_of(again.model)) == 4


@pytest.mark.parametrize(("kind", "options"), [("torchscript", {}), ("onnx", {"simplify": False})])
def test_export(folder, kind, options, monkeypatch):
    """By Ultralytics' own code: a file that needs no operator of this package."""
    monkeypatch.chdir(folder)  # where it is written
    detector = accelerate(RTDETR(str(folder / "rtdetr-tiny.yaml")))
    path = detector.export(format=kind, imgsz=SIZE, device="cpu", **options)
    image = torch.rand(1, 3, SIZE, SIZE)
    expected = detector.model.eval()(image)[0]
    if kind == "torchscript":
        found = torch.jit.load(path)(image)
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path)
        found = torch.from_numpy(session.run(None, {"images": image.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_saving(folder):
    detector = accelerate(RTDETR(str(folder / "rtdetr-tiny.yaml")))
    detector.save(folder / "saved.pt")
    assert b"groupdetr_fast" not in (folder / "saved.pt").read_bytes()
    assert type(RTDETR(folder / "saved.pt").model) is RTDETRDetectionModel
    assert issubclass(type(detector), Model)


@pytest.mark.parametrize("trainer", [AcceleratedTrainer, group_trainer(2)])
@pytest.mark.parametrize("cfg", ["yolo11n.yaml", {"nc": 2, "backbone": [], "head": [[[1, 2, 3], 1, "Detect", ["nc"]]]}])
def test_other_models_than_rt_detr_are_refused(trainer, cfg):
    with pytest.raises(TypeError, match="this trainer is for RT-DETR, and this model has the head Detect"):
        trainer.get_model(trainer.__new__(trainer), cfg)
