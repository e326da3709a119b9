"""The assignments that the paper compares: group-wise, one-to-one and naive one-to-many."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import groupdetr_fast as gd
from groupdetr_fast import ops
from groupdetr_fast.losses.criterion import SetCriterion
from groupdetr_fast.losses.matcher import GroupMatcher
from groupdetr_fast.models import DetectorOutput

CLASSES, SIZES = 5, (3, 0, 2)


@pytest.fixture
def targets(device):
    entries = [{"labels": torch.randint(CLASSES, (size,)), "boxes": random_boxes(size)} for size in SIZES]
    return gd.PackedTargets.from_list(entries).to(device)


def random_boxes(*shape):
    return torch.rand(*shape, 4) * 0.5 + 0.2


def random_predictions(num_queries, device, layers=2):
    logits = torch.randn(layers, len(SIZES), num_queries, CLASSES)
    return logits.to(device), random_boxes(layers, len(SIZES), num_queries).to(device)


def pairs_of(matching, targets, layer, image):
    """(target, query) pairs of one image."""
    shape = (matching.positives, targets.max_targets)
    queries = matching.queries[layer, image].view(shape).tolist()
    matched = matching.matched[layer, image].view(shape).tolist()
    return [
        (target, queries[copy][target])
        for copy in range(shape[0])
        for target in range(shape[1])
        if matched[copy][target]
    ]


@pytest.mark.parametrize(
    ("assignment", "positives", "groups", "repeats"),
    [
        ("one_to_one", None, (3, 4), 1),
        ("one_to_many", None, (3, 4), 3),  # as many positives as groups
        ("one_to_many", 2, (1, 12), 2),
        ("one_to_many", 5, (1, 12), 5),  # image 0: 15 copies of 3 targets, 12 queries
    ],
)
def test_all_queries_together_against_scipy(targets, device, assignment, positives, groups, repeats):
    logits, boxes = random_predictions(12, device)
    matcher = GroupMatcher(assignment=assignment, positives=positives)
    matching = matcher(logits, boxes, targets, gd.QueryGroups(*groups))
    assert matching.positives == repeats
    assert matching.queries.shape == (2, len(SIZES), repeats * max(SIZES))
    costs = ops.matching_cost(logits, boxes, targets).cpu().double().numpy()
    for layer in range(2):
        for image, size in enumerate(SIZES):
            cost = costs[layer, image, :size]  # [T, Q]
            pairs = pairs_of(matching, targets, layer, image)
            rows, columns = linear_sum_assignment(np.repeat(cost, repeats, axis=0))
            assert len(pairs) == len(rows) == min(size * repeats, 12)
            assert sum(cost[pair] for pair in pairs) == pytest.approx(
                np.repeat(cost, repeats, axis=0)[rows, columns].sum()
            )
            assert len({query for _, query in pairs}) == len(pairs)  # no query serves twice
            assert max(Counter(target for target, _ in pairs).values(), default=0) <= repeats


def test_groups_of_the_assignment_may_differ_from_those_of_attention(targets, device):
    """Table 7c: one sequence of queries whose self-attention is shared, matched in three parts."""
    logits, boxes = random_predictions(12, device)
    separate = GroupMatcher()(logits, boxes, targets, gd.QueryGroups(3, 4))
    shared = GroupMatcher(positives=3)(logits, boxes, targets, gd.QueryGroups(1, 12))
    assert torch.equal(separate.queries, shared.queries)
    assert torch.equal(separate.matched, shared.matched)
    assert shared.positives == 3


@pytest.mark.parametrize("assignment", ["group", "one_to_many"])
def test_with_one_positive_all_assignments_are_the_same(targets, device, assignment):
    logits, boxes = random_predictions(6, device)
    groups = gd.QueryGroups(1, 6)
    expected = GroupMatcher(assignment="one_to_one")(logits, boxes, targets, groups)
    matching = GroupMatcher(assignment=assignment)(logits, boxes, targets, groups)
    assert torch.equal(matching.queries, expected.queries)
    assert torch.equal(matching.matched, expected.matched)


def test_the_loss_is_the_mean_over_all_positives(targets, device):
    """One-to-many: every copy of a target counts as a box of its own."""
    logits, boxes = random_predictions(12, device)
    matcher = GroupMatcher(assignment="one_to_many", positives=3)
    groups = gd.QueryGroups(1, 12)
    losses = SetCriterion(matcher)(DetectorOutput(logits, boxes, groups), targets)
    matching = matcher(logits, boxes, targets, groups)
    distance = sum(
        (boxes[-1, image, query] - targets.boxes[image, target]).abs().sum().item()
        for image in range(len(SIZES))
        for target, query in pairs_of(matching, targets, -1, image)
    )
    assert losses["loss_bbox"].item() == pytest.approx(distance / (3 * sum(SIZES)))


def test_without_objects(device):
    empty = gd.PackedTargets.from_list([{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}])
    logits, boxes = torch.randn(1, 1, 6, CLASSES, device=device), random_boxes(1, 1, 6).to(device)
    criterion = SetCriterion(GroupMatcher(assignment="one_to_many", positives=3))
    losses = criterion(DetectorOutput(logits, boxes, gd.QueryGroups(1, 6)), empty.to(device))
    assert losses["loss_bbox"] == 0
    assert losses["loss_ce"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"assignment": "many"}, "assignment must be one of"),
        ({"positives": 0}, "positives must be at least 1"),
        ({"assignment": "one_to_one", "positives": 2}, "gives each target one query"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupMatcher(**settings)
    with pytest.raises(ValueError, match=message):
        gd.build_criterion("conditional_detr_r50", **settings)


def test_queries_that_cannot_be_split_are_refused(targets, device):
    with pytest.raises(ValueError, match="12 queries cannot be split into positives=5 equal groups"):
        GroupMatcher(positives=5)(*random_predictions(12, device), targets, gd.QueryGroups(1, 12))


def test_models_of_masks_have_one_assignment():
    with pytest.raises(ValueError, match='"group", alone'):
        gd.build_criterion("mask2former_r50", assignment="one_to_many")
