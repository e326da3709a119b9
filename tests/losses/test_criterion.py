"""The loss against transformers' loss of each group and a plain loop, and its independence of the data's values."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.layers.denoising import make_denoising_queries
from groupdetr_fast.losses import GroupMatcher, SetCriterion
from groupdetr_fast.models import DenoisingOutput, EncoderOutput

LAYERS, BATCH, CLASSES = 3, 3, 7


def predictions(groups, *, dtype=torch.float64, requires_grad=True, classes=CLASSES):
    logits = torch.randn(LAYERS, BATCH, groups.length, classes, dtype=dtype) * 2
    boxes = (torch.randn(LAYERS, BATCH, groups.length, 4, dtype=dtype)).sigmoid()
    return SimpleNamespace(
        logits=logits.requires_grad_(requires_grad), boxes=boxes.requires_grad_(requires_grad), groups=groups
    )


def random_targets(sizes, dtype=torch.float64):
    return [
        {
            "labels": torch.randint(CLASSES, (size,)),
            "boxes": torch.cat((torch.rand(size, 2) * 0.6 + 0.2, torch.rand(size, 2) * 0.3 + 0.05), dim=1).to(dtype),
        }
        for size in sizes
    ]


def mean_of_their_groups(out, targets):
    """transformers' loss (one group, one layer, a scipy loop) of every group and layer, averaged over groups."""
    theirs = pytest.importorskip("transformers.loss.loss_deformable_detr")
    matcher = theirs.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = theirs.DeformableDetrImageLoss(matcher, CLASSES, 0.25, ["labels", "boxes"])
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"].float()} for target in targets]
    names = {}
    for layer in range(len(out.logits)):
        suffix = "" if layer == len(out.logits) - 1 else f"_{layer}"
        for group in range(out.groups.num_groups):
            start, stop = out.groups.group_range(group)
            found = criterion(
                {
                    "logits": out.logits[layer, :, start:stop].float(),
                    "pred_boxes": out.boxes[layer, :, start:stop].float(),
                },
                labels,
            )
            for name, value in found.items():
                names[name + suffix] = names.get(name + suffix, 0) + value / out.groups.num_groups
    return names


@pytest.mark.parametrize(
    ("num_groups", "size", "targets"),
    [(1, 8, (3, 5, 1)), (4, 8, (3, 5, 1)), (3, 8, (0, 4, 8)), (2, 5, (1, 0, 0)), (3, 1, (1, 1, 0))],
)
def test_losses_equal_transformers(num_groups, size, targets):
    out = predictions(gd.QueryGroups(num_groups, size))
    targets = random_targets(targets)
    losses = gd.build_criterion("conditional_detr_r50")(out, gd.PackedTargets.from_list(targets))
    expected = mean_of_their_groups(out, targets)
    assert set(losses) == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].float(), value.float(), rtol=1e-5, atol=1e-5)
    weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    total = sum(weights[name.rpartition("_")[0] if name[-1].isdigit() else name] * v for name, v in expected.items())
    torch.testing.assert_close(losses["loss"].float(), total.float(), rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(losses["loss"], (out.logits, out.boxes), retain_graph=True)
    theirs = torch.autograd.grad(total, (out.logits, out.boxes))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-6)


def test_encoder_is_matched_as_one_more_layer():
    groups = gd.QueryGroups(3, 6)
    out, first_stage = predictions(groups), predictions(groups)
    out.encoder = EncoderOutput(first_stage.logits[0], first_stage.boxes[0])
    targets = random_targets((3, 0, 5))
    packed = gd.PackedTargets.from_list(targets)
    criterion = gd.build_criterion("conditional_detr_r50")
    losses = criterion(out, packed)
    first_stage.logits, first_stage.boxes = first_stage.logits[:1], first_stage.boxes[:1]
    expected = {f"{name}_enc": value for name, value in mean_of_their_groups(first_stage, targets).items()}
    expected |= mean_of_their_groups(out, targets)
    assert set(losses) == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].float(), value.float(), rtol=1e-5, atol=1e-5)
    total = 2 * expected["loss_ce_enc"] + 5 * expected["loss_bbox_enc"] + 2 * expected["loss_giou_enc"]
    out.encoder = None
    torch.testing.assert_close(losses["loss"], criterion(out, packed)["loss"] + total.float(), rtol=1e-5, atol=1e-5)


def with_denoising(out, packed, *, contrastive, scope="first"):
    """Give an output random predictions for denoising queries."""
    queries = make_denoising_queries(
        packed,
        out.groups,
        num_classes=CLASSES,
        number=10,
        label_noise=0.2,
        box_noise=0.4,
        contrastive=contrastive,
        scope=scope,
    )
    length = queries.groups.denoising_length
    logits = out.logits.new_empty(LAYERS, len(packed.sizes), length, CLASSES).normal_() * 2
    boxes = out.boxes.new_empty(LAYERS, len(packed.sizes), length, 4).normal_().sigmoid()
    out.denoising = DenoisingOutput(logits.requires_grad_(), boxes.requires_grad_(), queries)
    return out


def loop_over_denoising_queries(out, targets, *, contrastive):
    """The denoising losses, query by query.

    DN-DETR: every object that has noise must be reconstructed, and the sums are divided by the number of noised
    objects. DINO: the second half of each denoising group must predict nothing, and so must, in its repository, the
    padding; the sums are divided by the number of positives.
    """
    predicted, layout = out.denoising, out.denoising.queries.groups
    denoising_groups = layout.denoising_sets * layout.denoising_groups
    size = max(len(target["labels"]) for target in targets)
    divisor = sum(len(target["labels"]) for target in targets) * denoising_groups
    losses = {}
    for layer in range(LAYERS):
        ce = bbox = giou = 0
        for image, target in enumerate(targets):
            row = 0
            for _ in range(denoising_groups):
                for negative in (False, True) if contrastive else (False,):
                    for index in range(size):
                        positive = not negative and index < len(target["labels"])
                        expected = torch.zeros(CLASSES, dtype=torch.float64)
                        if positive:
                            expected[target["labels"][index]] = 1
                            ours, theirs = predicted.boxes[layer, image, row], target["boxes"][index]
                            bbox = bbox + (ours - theirs).abs().sum()
                            pair = torchvision.ops.box_convert(torch.stack((ours, theirs)), "cxcywh", "xyxy")
                            giou = giou + 1 - torchvision.ops.generalized_box_iou(pair[:1], pair[1:]).sum()
                        if positive or contrastive:
                            logits = predicted.logits[layer, image, row]
                            ce = ce + torchvision.ops.sigmoid_focal_loss(logits, expected, 0.25, 2.0, "sum")
                        row += 1
            assert row == layout.denoising_length
        suffix = "_dn" if layer == LAYERS - 1 else f"_dn_{layer}"
        losses |= {f"loss_ce{suffix}": ce, f"loss_bbox{suffix}": bbox, f"loss_giou{suffix}": giou}
    return {name: value / divisor for name, value in losses.items()}


@pytest.mark.parametrize("scope", ["first", "every"])
@pytest.mark.parametrize("contrastive", [False, True])
def test_denoising_losses_equal_a_plain_loop(contrastive, scope):
    out = predictions(gd.QueryGroups(2, 5))
    targets = random_targets((3, 0, 1))
    packed = gd.PackedTargets.from_list(targets)
    criterion = gd.build_criterion("dab_detr_r50")
    matched = criterion(out, packed)
    losses = criterion(with_denoising(out, packed, contrastive=contrastive, scope=scope), packed)
    expected = loop_over_denoising_queries(out, targets, contrastive=contrastive)
    assert set(losses) == {*matched, *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=1e-5)
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    total = sum(weights[name.partition("_dn")[0]] * value for name, value in expected.items())
    torch.testing.assert_close((losses["loss"] - matched["loss"]).double(), total, rtol=1e-4, atol=1e-4)
    inputs = (out.denoising.logits, out.denoising.boxes)
    ours = torch.autograd.grad(losses["loss"], inputs, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_denoising_padding_of_dn_detr_has_no_gradient():
    out = predictions(gd.QueryGroups(2, 5))
    packed = gd.PackedTargets.from_list(random_targets((3, 0, 1)))
    with_denoising(out, packed, contrastive=False)
    gd.build_criterion("dab_detr_r50")(out, packed)["loss"].backward()
    exists = out.denoising.queries.exists
    for predicted in (out.denoising.logits, out.denoising.boxes):
        assert not predicted.grad[:, ~exists].any()
        assert predicted.grad[:, exists].any(-1).all()


def test_images_without_objects():
    out = predictions(gd.QueryGroups(2, 4))
    targets = gd.PackedTargets.from_list(random_targets((0, 0, 0)))
    losses = gd.build_criterion("conditional_detr_r50")(out, targets)
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou"] == 0
    negative = 0.75 * out.logits.sigmoid() ** 2 * torch.nn.functional.softplus(out.logits)
    torch.testing.assert_close(losses["loss_ce"].double(), negative[-1].sum() / 2, rtol=1e-5, atol=1e-5)
    losses["loss"].backward()
    assert torch.isfinite(out.logits.grad).all()
    assert not out.boxes.grad.any()


def test_more_objects_than_queries():
    """Every query of each group gets an object; the others have none, and the loss stays finite."""
    out = predictions(gd.QueryGroups(2, 3))
    targets = gd.PackedTargets.from_list(random_targets((7, 2, 3)))
    criterion = gd.build_criterion("conditional_detr_r50")
    matching = criterion.matcher(out.logits.float(), out.boxes.float(), targets, out.groups)
    matched = matching.matched.view(LAYERS, BATCH, 2, 7).sum(-1)
    assert matched[:, 0].unique().tolist() == [3]
    assert matched[:, 1].unique().tolist() == [2]
    assert torch.isfinite(criterion(out, targets)["loss"])


def test_matching_is_one_to_one_inside_each_group():
    groups = gd.QueryGroups(5, 6)
    out = predictions(groups, dtype=torch.float32)
    targets = gd.PackedTargets.from_list(random_targets((6, 2, 4), torch.float32))
    matching = gd.build_criterion("conditional_detr_r50").matcher(out.logits, out.boxes, targets, groups)
    queries = matching.queries.view(LAYERS, BATCH, 5, 6)
    matched = matching.matched.view(LAYERS, BATCH, 5, 6)
    for group in range(5):
        for image, size in enumerate(targets.sizes):
            for layer in range(LAYERS):
                rows = queries[layer, image, group][matched[layer, image, group]]
                assert len(rows) == size == len(rows.unique())
                assert ((rows >= group * 6) & (rows < (group + 1) * 6)).all()


def test_non_finite_predictions_do_not_spoil_the_matching():
    out = predictions(gd.QueryGroups(2, 5), dtype=torch.float32, requires_grad=False)
    targets = gd.PackedTargets.from_list(random_targets((2, 3, 1), torch.float32))
    criterion = gd.build_criterion("conditional_detr_r50")
    out.boxes[:, 0, 3] = float("nan")
    matching = criterion.matcher(out.logits, out.boxes, targets, out.groups)
    assert matching.matched[:, 0].view(LAYERS, 2, 3)[..., :2].all()
    assert not ((matching.queries[:, 0] == 3) & matching.matched[:, 0]).any()


@pytest.mark.parametrize(
    ("sizes", "contrastive"), [((3, 5, 1), None), ((0, 0, 0), None), ((3, 0, 1), False), ((3, 0, 1), True)]
)
def test_compiles_without_a_break(sizes, contrastive):
    """A full graph exists only if no shape, branch or copy depends on what the tensors hold."""
    groups = gd.QueryGroups(3, 6)
    out = predictions(groups, dtype=torch.float32)
    targets = gd.PackedTargets.from_list(random_targets(sizes, torch.float32))
    denoising = encoder = None
    if contrastive is not None:
        denoising = with_denoising(out, targets, contrastive=contrastive).denoising
        encoder = EncoderOutput(out.logits[0].detach(), out.boxes[0].detach())
    criterion = gd.build_criterion("conditional_detr_r50")

    def loss(logits, boxes):
        return criterion(gd.DetectorOutput(logits, boxes, groups, denoising, encoder), targets)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(out.logits, out.boxes)
    eager = loss(out.logits, out.boxes)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)
    grads = [torch.autograd.grad(losses["loss"], (out.logits, out.boxes)) for losses in (compiled, eager)]
    torch.testing.assert_close(grads[0], grads[1])


def test_traces_with_fake_gpu_tensors():
    """On tensors without data, any host synchronisation (item, cpu, nonzero, boolean indexing) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    groups = gd.QueryGroups(3, 6)
    criterion = gd.build_criterion("conditional_detr_r50")
    with FakeTensorMode():
        device = torch.device("cuda")
        logits = torch.empty(LAYERS, 2, 18, CLASSES, device=device, requires_grad=True)
        boxes = torch.empty(LAYERS, 2, 18, 4, device=device, requires_grad=True)
        targets = gd.PackedTargets(
            torch.empty(2, 5, dtype=torch.int64, device=device),
            torch.empty(2, 5, 4, device=device),
            torch.empty(2, dtype=torch.int64, device=device),
            (5, 2),
        )
        out = with_denoising(SimpleNamespace(logits=logits, boxes=boxes, groups=groups), targets, contrastive=True)
        out.encoder = EncoderOutput(logits[0], boxes[0])
        losses = criterion(out, targets)
        assert losses["loss"].device.type == "cuda"  # its backward pass would need a GPU even for fake tensors


def test_wrong_number_of_queries_is_refused():
    out = predictions(gd.QueryGroups(2, 4))
    out.groups = gd.QueryGroups(3, 4)
    with pytest.raises(ValueError, match=r"logits must have 3 \* 4 = 12 queries in dimension -2"):
        gd.build_criterion("conditional_detr_r50")(out, gd.PackedTargets.from_list(random_targets((1, 1, 1))))


def test_outputs_of_other_kinds_are_refused():
    criterion, targets = gd.build_criterion("conditional_detr_r50"), gd.PackedTargets.from_list(random_targets((1, 1)))
    with pytest.raises(TypeError, match=r"out must have logits, boxes and groups, .* got a dict; dictionaries of DETR"):
        criterion({"pred_logits": torch.zeros(2, 8, 3)}, targets)
    one_layer = gd.DetectorOutput(torch.zeros(2, 8, 3), torch.rand(2, 8, 4), gd.QueryGroups(2, 4))
    with pytest.raises(ValueError, match=r"logits must have shape \[layers, B, K \* N, C\], got \[2, 8, 3\]"):
        criterion(one_layer, targets)
    one_layer.groups = 2
    with pytest.raises(TypeError, match="out must have logits, boxes and groups"):
        criterion(one_layer, targets)


def test_criterion_of_a_model_takes_its_weights():
    model = gd.build_model(
        "conditional_detr_r50", num_classes=2, num_groups=1, backbone="conv:8", class_loss=3.0, giou_cost=7.0
    )
    for source in (model, model.config):
        criterion = gd.build_criterion(source)
        assert criterion.weights == {"loss_ce": 3.0, "loss_bbox": 5.0, "loss_giou": 2.0}
        assert criterion.matcher.giou_cost == 7.0
    with pytest.raises(TypeError, match="expected a model of this package"):
        gd.build_criterion(torch.nn.Linear(1, 1))


class Operators(TorchDispatchMode):
    """Counts operators, but for those that only make another view of a tensor."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def test_operators_are_few_and_of_one_number_for_all_sizes():
    """On a GPU each is a launch or more, and where batches are small the host is the limit."""
    for groups, sizes in ((gd.QueryGroups(1, 4), (2, 2, 2)), (gd.QueryGroups(3, 5), (2, 3, 0))):
        out, targets = predictions(groups), random_targets(sizes)
        criterion = SetCriterion(GroupMatcher())
        packed = gd.PackedTargets.from_list(targets)
        with Operators() as forward:
            loss = criterion(out, packed)["loss"]
        with Operators() as backward:
            torch.autograd.grad(loss, (out.logits, out.boxes))
        assert forward.number <= 72
        assert backward.number <= 75
