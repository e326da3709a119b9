"""Weights of classes in the class loss, against a loop over queries."""

import pytest
import torch
import torchvision
from test_criterion import CLASSES, LAYERS, predictions, random_targets, with_denoising
from test_mask_criterion import criterion_of
from test_mask_criterion import predictions as mask_predictions
from test_mask_criterion import random_targets as mask_targets
from torch._subclasses.fake_tensor import FakeTensorMode

import groupdetr_fast as gd
from groupdetr_fast.losses import GroupMatcher, SetCriterion
from groupdetr_fast.models import EncoderOutput

WEIGHTS = [0.5, 3.0, 1.0, 2.0, 0.25, 1.5, 7.0]


def class_losses_by_a_loop(criterion, out, packed):
    """The class loss of each layer, query by query, with torchvision's focal loss and weights."""
    matching = criterion.matcher(out.logits.detach(), out.boxes.detach(), packed, out.groups)
    classes = matching.classes(packed, out.logits.shape[2], -1)
    sums = []
    for logits, of_layer in zip(out.logits, classes, strict=True):
        expected = torch.nn.functional.one_hot(of_layer.clamp(min=0), CLASSES) * (of_layer >= 0)[..., None]
        each = torchvision.ops.sigmoid_focal_loss(logits, expected.to(logits), 0.25, 2.0).sum(-1)
        weights = torch.tensor(WEIGHTS, dtype=each.dtype)[of_layer.clamp(min=0)].where(of_layer >= 0, 1.0)
        sums.append((weights * each).sum())
    return torch.stack(sums) / (sum(packed.sizes) * out.groups.num_groups)


@pytest.mark.parametrize("sizes", [(3, 5, 1), (0, 0, 2)])
def test_the_loss_of_a_query_counts_by_the_class_of_its_object(sizes):
    out = predictions(gd.QueryGroups(3, 6))
    packed = gd.PackedTargets.from_list(random_targets(sizes))
    criterion = SetCriterion(GroupMatcher(), class_loss=1.0, class_weights=WEIGHTS)
    losses = criterion(out, packed)
    expected = class_losses_by_a_loop(criterion, out, packed)
    found = torch.stack([*(losses[f"loss_ce_{layer}"] for layer in range(LAYERS - 1)), losses["loss_ce"]])
    torch.testing.assert_close(found.double(), expected)
    ours = torch.autograd.grad(found.sum(), out.logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), out.logits)[0])


def test_boxes_and_the_matching_know_nothing_of_the_weights():
    out = predictions(gd.QueryGroups(3, 6))
    packed = gd.PackedTargets.from_list(random_targets((3, 5, 1)))
    weighted, plain = (SetCriterion(GroupMatcher(), class_weights=weights)(out, packed) for weights in (WEIGHTS, None))
    for name in plain:
        assert torch.equal(weighted[name], plain[name]) == name.startswith(("loss_bbox", "loss_giou")), name


def test_weights_of_1_change_nothing():
    out = predictions(gd.QueryGroups(2, 5))
    packed = gd.PackedTargets.from_list(random_targets((3, 0, 1)))
    with_denoising(out, packed, contrastive=True)
    out.encoder = EncoderOutput(out.logits[0], out.boxes[0])
    ones, plain = (
        SetCriterion(GroupMatcher(), class_weights=weights)(out, packed) for weights in ([1.0] * CLASSES, None)
    )
    assert ones.keys() == plain.keys()
    assert all(torch.equal(ones[name], plain[name]) for name in plain)


@pytest.mark.parametrize("contrastive", [False, True])
def test_denoising_queries_count_by_the_class_of_their_object(contrastive):
    out = predictions(gd.QueryGroups(2, 5))
    targets = random_targets((3, 0, 1))
    packed = gd.PackedTargets.from_list(targets)
    with_denoising(out, packed, contrastive=contrastive)
    criterion = SetCriterion(GroupMatcher(), class_weights=WEIGHTS)
    losses, queries = criterion(out, packed), out.denoising.queries
    total = torch.zeros((), dtype=torch.float64)
    for image, target in enumerate(targets):
        for row in range(queries.groups.denoising_length):
            if not (queries.positive[image, row] or queries.negative[image, row]):
                continue
            expected, weight = torch.zeros(CLASSES, dtype=torch.float64), 1.0
            if queries.positive[image, row]:
                label = int(target["labels"][queries.target[image, row]])
                expected[label], weight = 1, WEIGHTS[label]
            logits = out.denoising.logits[-1, image, row]
            total += weight * torchvision.ops.sigmoid_focal_loss(logits, expected, 0.25, 2.0, "sum")
    divisor = 4 * queries.groups.denoising_sets * queries.groups.denoising_groups
    torch.testing.assert_close(losses["loss_ce_dn"].double(), total / divisor)


def test_nothing_waits_for_the_device():
    groups = gd.QueryGroups(3, 6)
    with FakeTensorMode():
        device = torch.device("cuda")
        criterion = SetCriterion(GroupMatcher(), class_weights=WEIGHTS).to(device)
        logits = torch.empty(LAYERS, 2, 18, CLASSES, device=device, requires_grad=True)
        boxes = torch.empty(LAYERS, 2, 18, 4, device=device, requires_grad=True)
        targets = gd.PackedTargets(
            torch.empty(2, 5, dtype=torch.int64, device=device),
            torch.empty(2, 5, 4, device=device),
            torch.empty(2, dtype=torch.int64, device=device),
            (5, 2),
        )
        assert criterion(gd.DetectorOutput(logits, boxes, groups), targets)["loss"].device.type == "cuda"


def test_masks_have_weights_in_the_cross_entropy_alone():
    out, targets = mask_predictions(gd.QueryGroups(2, 5)), gd.PackedTargets.from_list(mask_targets((2, 0, 4)))
    weights = WEIGHTS[:5]
    torch.manual_seed(3)
    criterion = criterion_of(class_weights=weights)
    losses = criterion(out, targets)
    torch.manual_seed(3)
    plain = criterion_of()(out, targets)
    for name in plain:
        same = torch.equal(plain[name], losses[name])
        assert same == name.startswith(("loss_mask", "loss_dice")), name
    torch.manual_seed(3)
    frame = tuple(out.padding.shape[1:])
    arguments = (out.logits.detach(), out.mask_embeddings.detach(), out.mask_features.detach())
    classes = criterion.matcher(*arguments, targets, out.groups, frame).classes(targets, 10, 5)[-1]
    table = torch.tensor([*weights, 0.1])
    expected = (table[classes] * -out.logits[-1].log_softmax(-1).gather(-1, classes[..., None])[..., 0]).sum()
    expected = expected / (2 * (6 + 0.1 * (3 * 5 - 6)))  # as without weights
    torch.testing.assert_close(losses["loss_ce"], expected)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [float("nan")], [float("inf")], [[1.0]]])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(ValueError, match="class_weights must be a list of positive numbers, one for each class"):
        SetCriterion(GroupMatcher(), class_weights=weights)


def test_a_models_criterion_takes_weights_of_its_classes():
    model = gd.build_model("conditional_detr_r50", num_classes=2, num_groups=1, backbone="conv:8")
    assert gd.build_criterion(model, class_weights=[1.0, 2.0]).class_weights.tolist() == [1, 2]
    assert "class_weights" not in gd.build_criterion(model, class_weights=[1.0, 2.0]).state_dict()
    with pytest.raises(ValueError, match="class_weights must be 2, one for each class, got 3"):
        gd.build_criterion(model, class_weights=[1.0, 2.0, 3.0])
