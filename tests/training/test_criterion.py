"""The loss against transformers' loss of each group, and its independence of the data's values."""

from types import SimpleNamespace

import pytest
import torch

import groupdetr_fast as gd

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
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
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


@pytest.mark.parametrize("sizes", [(3, 5, 1), (0, 0, 0)])
def test_compiles_without_a_break(sizes):
    """A full graph exists only if no shape, branch or copy depends on what the tensors hold."""
    groups = gd.QueryGroups(3, 6)
    out = predictions(groups, dtype=torch.float32)
    targets = gd.PackedTargets.from_list(random_targets(sizes, torch.float32))
    criterion = gd.build_criterion("conditional_detr_r50")

    def loss(logits, boxes):
        return criterion(gd.DetectorOutput(logits, boxes, groups), targets)

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
        losses = criterion(SimpleNamespace(logits=logits, boxes=boxes, groups=groups), targets)
        assert losses["loss"].device.type == "cuda"  # its backward pass would need a GPU even for fake tensors


def test_wrong_number_of_queries_is_refused():
    out = predictions(gd.QueryGroups(2, 4))
    out.groups = gd.QueryGroups(3, 4)
    with pytest.raises(ValueError, match=r"logits must have 3 \* 4 = 12 queries in dimension -2"):
        gd.build_criterion("conditional_detr_r50")(out, gd.PackedTargets.from_list(random_targets((1, 1, 1))))


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
