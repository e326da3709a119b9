"""RF-DETR with this package's kernels against the untouched one."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("rfdetr", reason="rfdetr is not installed")
pytest.importorskip("pytorch_lightning", reason="what rfdetr needs for training is not installed: rfdetr[train]")

from rfdetr.models.criterion import SetCriterion
from rfdetr.models.matcher import HungarianMatcher
from rfdetr.models.ops.modules import MSDeformAttn
from tiny_rfdetr import CLASSES, batch_of, detector_of, module_of, targets_of

from groupdetr_fast import ops
from groupdetr_fast.integrations.rfdetr import accelerate, acceleration, attention, criterion, restore

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
COUNTS = [(2,), (3, 1), (0, 0), (1, 9, 0)]  # 9: more objects than queries

pytestmark = pytest.mark.skipif(not attention.DEVICES, reason="groupdetr_fast was built without its kernels")


@pytest.fixture(autouse=True)
def _any_version(monkeypatch):
    """The tests say whether another version works, too."""
    monkeypatch.setattr(acceleration, "_VERSION", "1.11.2")


def step(module, batch):
    """Losses of a training step by name, and gradients."""
    found = {}
    module.log_dict = lambda losses, **kwargs: found.update(losses)
    module.zero_grad()
    result = module.training_step(batch, 0)
    loss = result["loss"] if isinstance(result, dict) else result
    loss.backward()
    losses = {name: value.detach() for name, value in found.items()} | {"loss": loss.detach()}
    return losses, {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_same_step(step, expected_step, tolerance):
    losses, gradients = step
    expected_losses, expected_gradients = expected_step
    for name in ("train/class_error", "train/cardinality_error"):  # which are float32 in float64, too
        torch.testing.assert_close(losses[name].float(), expected_losses[name].float(), rtol=1e-6, atol=1e-6)
    losses, expected_losses = ({n: v for n, v in x.items() if "error" not in n} for x in (losses, expected_losses))
    assert {"train/loss_ce", "train/loss_ce_aux"} <= set(losses)
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance, check_dtype=False)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values()).item()
    torch.testing.assert_close(gradients, expected_gradients, rtol=tolerance, atol=tolerance * largest)


def exchanged_of(model):
    return [part for part in model.modules() if attention.is_exchanged(part) or criterion.is_exchanged(part)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("num_groups", [1, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_a_step_stays_the_same(dtype, tolerance, num_groups, counts):
    batch = batch_of(counts, dtype=dtype)
    expected = step(module_of(num_groups, dtype), batch)
    module = accelerate(module_of(num_groups, dtype))
    assert len(exchanged_of(module)) == 3  # the criterion, and the attention of two layers
    assert_same_step(step(module, batch), expected, tolerance)


def test_ops_are_what_runs(monkeypatch):
    calls = []
    for name in ("ms_deform_attn", "matching_cost", "linear_assignment"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, run=run, name=name, **kw: calls.append(name) or run(*args, **kw))
    step(accelerate(module_of(2)), batch_of((3, 1)))
    assert sorted(calls) == ["linear_assignment", "matching_cost", "ms_deform_attn", "ms_deform_attn"]
    step(restore(accelerate(module_of(2))), batch_of((3, 1)))
    assert len(calls) == 4


def test_fewer_proposals_than_queries():
    """Images of 64 pixels have 16 proposals; the encoder's losses are then of other shapes than the decoder's."""
    batch = batch_of((3, 1), dtype=torch.float64)
    expected = step(module_of(3, torch.float64, num_queries=20), batch)
    assert_same_step(step(accelerate(module_of(3, torch.float64, num_queries=20)), batch), expected, 1e-9)


def test_evaluation():
    images, targets = batch_of((3, 1), dtype=torch.float64)
    theirs, ours = module_of(3, torch.float64).eval(), accelerate(module_of(3, torch.float64).eval())
    with torch.no_grad():
        outputs, expected = ours.model(images), theirs.model(images)
        torch.testing.assert_close(outputs["pred_boxes"], expected["pred_boxes"])
        torch.testing.assert_close(ours.criterion(outputs, targets), theirs.criterion(expected, targets))


def outputs_of(counts, num_groups, dtype=torch.float32, queries=5):
    """Random predictions of three layers and the encoder."""
    generator = torch.Generator().manual_seed(3)

    def layer():
        logits = 2 * torch.randn(len(counts), num_groups * queries, CLASSES, generator=generator, dtype=torch.float64)
        boxes = torch.randn(len(counts), num_groups * queries, 4, generator=generator, dtype=torch.float64).sigmoid()
        return {"pred_logits": logits.to(dtype).requires_grad_(), "pred_boxes": boxes.to(dtype).requires_grad_()}

    return {**layer(), "aux_outputs": [layer(), layer()], "enc_outputs": layer()}


def criterion_of(num_groups, matcher=None, **options):
    options = {"focal_alpha": 0.25, "losses": ["labels", "boxes", "cardinality"], "ia_bce_loss": True, **options}
    return SetCriterion(CLASSES, matcher or HungarianMatcher(2, 5, 2), WEIGHTS, group_detr=num_groups, **options)


def losses_and_gradients(criterion, outputs, targets, **options):
    losses = criterion(outputs, targets, **options)
    layers = [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]
    inputs = [layer[name] for layer in layers for name in ("pred_logits", "pred_boxes")]
    total = sum(weight * value for key, weight in WEIGHTS.items() for name, value in losses.items() if key in name)
    return losses, torch.autograd.grad(total, inputs, materialize_grads=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ia_bce_loss": False},
        {"losses": ["labels", "boxes"], "focal_alpha": 0.4},
        {"losses": ["boxes", "cardinality"]},
        {"sum_group_losses": True},
        {"use_varifocal_loss": True},  # which ia_bce_loss outranks
        {"matcher": HungarianMatcher(1, 2, 3, focal_alpha=0.6)},
    ],
    ids=str,
)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_losses(options, counts, monkeypatch):
    outputs, targets = outputs_of(counts, 3), targets_of(counts)
    expected = losses_and_gradients(criterion_of(3, **options), outputs, targets)
    theirs = accelerate(criterion_of(3, **options))
    monkeypatch.setattr(SetCriterion, "forward", None)
    found = losses_and_gradients(theirs, outputs, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_masks_are_left_to_them():
    """But not the attention; their loss compares masks at random points."""

    def step_of(module):
        images, targets = batch_of((3, 1))
        for target in targets:
            target["masks"] = torch.ones(len(target["labels"]), 64, 64, dtype=torch.bool)
        torch.manual_seed(0)
        return step(module, (images, targets))

    module = accelerate(module_of(2, segmentation_head=True))
    losses, _ = found = step_of(module)
    assert "train/loss_mask_dice" in losses
    assert_same_step(found, step_of(module_of(2, segmentation_head=True)), 1e-5)


def test_prediction(monkeypatch):
    calls = []
    run = ops.ms_deform_attn
    monkeypatch.setattr(ops, "ms_deform_attn", lambda *args: calls.append(args) or run(*args))
    detector, image = detector_of(2), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = detector.predict(image, threshold=0.0)
    assert not calls
    found = accelerate(detector).predict(image, threshold=0.0)
    assert len(calls) == 2
    torch.testing.assert_close(torch.from_numpy(found.xyxy), torch.from_numpy(expected.xyxy), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(found.confidence), torch.from_numpy(expected.confidence))


@pytest.mark.parametrize("num_boxes", [1.0, 7, torch.tensor(3.0)], ids=str)
def test_given_number_of_boxes(num_boxes):
    outputs, targets = outputs_of((3, 1), 2), targets_of((3, 1))
    expected = losses_and_gradients(criterion_of(2), outputs, targets, num_boxes=num_boxes)
    found = losses_and_gradients(accelerate(criterion_of(2)), outputs, targets, num_boxes=num_boxes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def negative_label(targets):
    targets[0]["labels"][1] = -1


def tiny_box(targets):
    targets[1]["boxes"][0, 2:] = 3e-4


def box_outside(targets):
    targets[0]["boxes"][0, 0] = 1.3


def padded(targets):
    for target in targets:
        target["valid"] = torch.arange(3) < len(target["labels"])
        missing = 3 - len(target["labels"])
        target["labels"] = torch.nn.functional.pad(target["labels"], (0, missing))
        target["boxes"] = torch.nn.functional.pad(target["boxes"], (0, 0, 0, missing), value=0.5)


def short_labels(targets):
    for target in targets:
        target["labels"] = target["labels"].int()


@pytest.mark.parametrize("change", [negative_label, tiny_box, box_outside, padded, short_labels])
def test_targets_that_are_left_to_them(change):
    outputs, targets = outputs_of((3, 1), 2), targets_of((3, 1))
    change(targets)
    expected = losses_and_gradients(criterion_of(2), outputs, targets)
    found = losses_and_gradients(accelerate(criterion_of(2)), outputs, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_predicted_boxes_that_are_left_to_them(value):
    outputs, targets = outputs_of((3, 1), 2), targets_of((3, 1))
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_boxes"][0, 3, 2] = value
    expected = losses_and_gradients(criterion_of(2), outputs, targets)
    found = losses_and_gradients(accelerate(criterion_of(2)), outputs, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class OtherMatcher(HungarianMatcher):
    pass


def hooked_matcher():
    matcher = HungarianMatcher(2, 5, 2)
    matcher.register_forward_hook(lambda *args: None)
    return matcher


@pytest.mark.parametrize(
    "options",
    [
        {"ia_bce_loss": False, "use_varifocal_loss": True},
        {"ia_bce_loss": False, "use_position_supervised_loss": True},
        {"matcher": OtherMatcher(2, 5, 2)},
        {"matcher": hooked_matcher()},
    ],
    ids=str,
)
def test_options_that_are_left_to_them(options):
    outputs, targets = outputs_of((3, 1), 2), targets_of((3, 1))
    expected = losses_and_gradients(criterion_of(2, **options), outputs, targets)
    found = losses_and_gradients(accelerate(criterion_of(2, **options)), outputs, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_label_beyond_the_classes_is_their_error():
    outputs, targets = outputs_of((3, 1), 2), targets_of((3, 1))
    targets[0]["labels"][0] = CLASSES
    with pytest.raises(IndexError):
        accelerate(criterion_of(2))(outputs, targets)


def test_class_loss_of_half_logits_is_that_of_float32():
    """RF-DETR's own, computed in bfloat16, is another one."""
    outputs, targets = outputs_of((3, 1), 2, torch.bfloat16), targets_of((3, 1))
    full = {name: outputs[name].float() for name in ("pred_logits", "pred_boxes")}
    half = {"pred_logits": outputs["pred_logits"], "pred_boxes": full["pred_boxes"]}
    expected = criterion_of(2)(full, targets)["loss_ce"]
    torch.testing.assert_close(accelerate(criterion_of(2))(half, targets)["loss_ce"], expected, rtol=1e-5, atol=0)
    assert (criterion_of(2)(half, targets)["loss_ce"] / expected - 1).abs() > 1e-3


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("levels", [1, 2])
def test_attention(coordinates, levels, monkeypatch):
    """Also with reference points that all levels share, and with padding."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4)]
    module = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    query = torch.randn(2, 6, 32, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 6, levels, coordinates, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 47, 32, generator=generator, dtype=torch.float64)
    padding = torch.arange(47) > torch.tensor([[46], [40]])
    inputs = [query, points, memory]

    def run():
        tensors = [tensor.requires_grad_() for tensor in inputs]
        out = module(*tensors, torch.tensor(shapes), torch.tensor([0, 35]), padding, input_spatial_shapes_hw=shapes)
        return out, *torch.autograd.grad(out.square().sum(), [*tensors, *module.parameters()])

    expected = run()
    attention.exchange(module)
    torch.testing.assert_close(run(), expected)
    monkeypatch.setattr(ops, "ms_deform_attn", None)
    with pytest.raises(TypeError):
        run()
    monkeypatch.setattr(attention, "has_kernel", lambda device: False)
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)
    monkeypatch.undo()
    monkeypatch.setattr(ops, "ms_deform_attn", None)
    module.export()
    torch.testing.assert_close(run(), expected)


def test_restore_gives_back_the_module():
    untouched, module = module_of(2), module_of(2)
    accelerate(accelerate(module, groups_per_pass=1))
    assert list(module.state_dict()) == list(untouched.state_dict())
    assert isinstance(module.criterion, SetCriterion)
    restore(restore(accelerate(module, groups_per_pass=1)))
    for ours, theirs in zip(module.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert set(vars(ours)) == set(vars(theirs))


def test_copies_and_pickles():
    module, batch = accelerate(module_of(2)), batch_of((3, 1))
    expected = step(module, batch)
    del module.log, module.log_dict  # functions of this test, which cannot be pickled
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert len(exchanged_of(other)) == 3
        other.log = lambda *args, **kwargs: None
        assert_same_step(step(other, batch), expected, 1e-6)
        assert not exchanged_of(restore(other))


class OtherCriterion(SetCriterion):
    pass


def test_subclasses_are_left_alone():
    module = module_of(2)
    module.criterion.__class__ = OtherCriterion
    assert len(exchanged_of(accelerate(module))) == 2
    assert type(restore(module).criterion) is OtherCriterion


@pytest.mark.parametrize("version", ["1.10.1", "1.12.0", "2.0.0"])
def test_other_versions_are_left_alone(version, monkeypatch):
    monkeypatch.setattr(acceleration, "_VERSION", version)
    module, detector = module_of(2), detector_of(2)
    for model in (module, detector):
        with pytest.warns(UserWarning, match=rf"tested with rfdetr 1.11, not {version}: the model is unchanged"):
            assert accelerate(model, groups_per_pass=1) is model
    assert not exchanged_of(module)
    assert type(module) is type(module_of(2))
    assert "train" not in vars(detector)


def test_without_kernels_the_model_is_left_alone(monkeypatch):
    references = {"cpu": "reference", "cuda": "reference"}
    monkeypatch.setattr(ops.serving, "kinds_of", lambda op: references)
    monkeypatch.setattr(attention, "DEVICES", frozenset())  # which is read once, when the module is imported
    module = module_of(2)
    with pytest.warns(UserWarning, match="without its compiled kernels: the model is unchanged"):
        accelerate(module)
    assert not exchanged_of(module)


def test_what_is_refused():
    with pytest.raises(TypeError, match="model must be an RFDETR, an RFDETRModelModule or another module, got str"):
        accelerate("rf-detr-nano.pth")
    with pytest.raises(ValueError, match="Linear has neither RF-DETR's deformable attention nor its criterion"):
        accelerate(torch.nn.Linear(1, 1))
    for number in (0, 1.0):
        with pytest.raises(ValueError, match=f"groups_per_pass must be an integer of at least 1, got {number}"):
            accelerate(module_of(2), groups_per_pass=number)
    with pytest.raises(TypeError, match="groups_per_pass needs an RFDETR or an RFDETRModelModule, got LWDETR"):
        accelerate(module_of(2).model, groups_per_pass=1)
