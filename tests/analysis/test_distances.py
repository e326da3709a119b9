"""Equations 6 and 7 against cases worked out by hand and against plain loops."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import groupdetr_fast as gd
from groupdetr_fast.analysis.distances import (
    DistanceRecorder,
    matching_distance,
    perturbation_distance,
    query_positions,
    read_distances,
)
from groupdetr_fast.losses.matcher import GroupMatcher, Matching

SMALL = {
    "num_queries": 4,
    "d_model": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dim_feedforward": 32,
    "backbone": "conv:8",
}


def test_perturbation_distance_by_hand():
    first = [[0.0, 0.0], [1.0, 0.0]]
    second = [[0.0, 0.3], [0.0, 0.4]]
    # from the first group: 0.3, sqrt(1 + 0.09); from the second: 0.3, 0.4
    expected = (0.3 + math.sqrt(1.09) + 0.3 + 0.4) / 4
    assert perturbation_distance(torch.tensor([first, second])).item() == pytest.approx(expected)


def test_perturbation_distance_is_the_mean_over_pairs_of_groups():
    positions = torch.rand(4, 5, 2)
    total = 0.0
    for a in range(4):
        for b in range(4):
            if a != b:
                total += sum(min(math.dist(p, q) for q in positions[b].tolist()) for p in positions[a].tolist()) / 5
    assert perturbation_distance(positions).item() == pytest.approx(total / 12)


def test_matching_distance_by_hand():
    positions = torch.tensor([[[0.0, 0.0], [0.5, 0.5]], [[0.3, 0.4], [1.0, 1.0]]])
    # two images: object 0 of the first and of the second, object 1 of the second alone
    queries = torch.tensor([[0, 0, 2, 0], [1, 0, 2, 3]])  # [B, K * T]
    matched = torch.tensor([[True, False, True, False], [True, True, True, True]])
    distances = [math.dist((0, 0), (0.3, 0.4)), math.dist((0.5, 0.5), (0.3, 0.4)), math.dist((0, 0), (1, 1))]
    expected = sum(distances) / 3
    assert matching_distance(positions, Matching(queries, matched, 2)).item() == pytest.approx(expected)


def test_matching_distance_against_a_loop():
    groups, size, sizes = 3, 6, (2, 0, 4)
    targets = gd.PackedTargets.from_list(
        [{"labels": torch.randint(5, (n,)), "boxes": torch.rand(n, 4) * 0.5 + 0.2} for n in sizes]
    )
    layout = gd.QueryGroups(groups, size)
    matching = GroupMatcher()(torch.randn(3, 18, 5), torch.rand(3, 18, 4) * 0.5 + 0.2, targets, layout)
    positions = torch.rand(groups, size, 2)
    flat, distances = positions.flatten(0, 1).tolist(), []
    for image, number in enumerate(sizes):
        for target in range(number):
            rows = [matching.queries[image, group * max(sizes) + target].item() for group in range(groups)]
            distances += [math.dist(flat[rows[a]], flat[rows[b]]) for a in range(groups) for b in range(a)]
    assert matching_distance(positions, matching).item() == pytest.approx(sum(distances) / len(distances))


@pytest.mark.parametrize("distance", [perturbation_distance, lambda p: matching_distance(p, Matching(None, None, 1))])
def test_one_group_has_no_distance(distance):
    with pytest.raises(ValueError, match="at least 2 groups, got 1"):
        distance(torch.rand(1, 5, 2))


@pytest.mark.parametrize("name", ["conditional_detr_r50", "dab_detr_r50", "dn_detr_r50"])
def test_positions_are_where_the_boxes_start(name):
    """A box head that predicts no offset leaves every box at its query's position."""
    model = gd.build_model(name, num_classes=3, num_groups=2, **SMALL).eval()
    torch.nn.init.zeros_(model.bbox_embed.layers[-1].weight)
    torch.nn.init.zeros_(model.bbox_embed.layers[-1].bias)
    positions = query_positions(model)
    assert positions.shape == (2, 4, 2)
    with torch.no_grad():
        boxes = model(torch.rand(1, 3, 32, 32), num_groups=2).boxes[-1, 0]
    torch.testing.assert_close(positions.flatten(0, 1), boxes[:, :2])


def test_selected_queries_have_no_learned_position():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "num_heads": 2, "dim_feedforward": 32}
    model = gd.build_model(
        "dino_4scale_r50", num_classes=3, num_groups=2, num_queries=4, backbone="conv:8-8-8", **layers
    )
    with pytest.raises(ValueError, match="queries of Dino have no learned positions"):
        query_positions(model)


@dataclass
class Output:
    logits: Tensor
    boxes: Tensor
    groups: gd.QueryGroups


@pytest.fixture
def observed():
    model = gd.build_model("conditional_detr_r50", num_classes=3, num_groups=2, **SMALL)
    targets = gd.PackedTargets.from_list([{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}])
    output = Output(torch.randn(1, 1, 8, 3), torch.rand(1, 1, 8, 4) * 0.5 + 0.2, gd.QueryGroups(2, 4))
    return model, output, targets


def test_the_recorder_replaces_steps_that_are_trained_again(tmp_path, observed):
    path = tmp_path / "distances.csv"
    recorder = DistanceRecorder(path, GroupMatcher(), every=3)
    for step in range(1, 8):
        recorder(step, *observed)
    rows = read_distances(path)
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert rows[0]["perturbation_distance"] == pytest.approx(perturbation_distance(query_positions(observed[0])).item())
    resumed = DistanceRecorder(path, GroupMatcher(), every=3)
    for step in range(5, 10):
        resumed(step, *observed)
    assert [row["step"] for row in read_distances(path)] == [1, 3, 6, 9]


def test_batches_without_objects_are_not_recorded(tmp_path, observed):
    model, output, _ = observed
    empty = gd.PackedTargets.from_list([{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}])
    DistanceRecorder(tmp_path / "distances.csv", GroupMatcher(), every=1)(1, model, output, empty)
    assert read_distances(tmp_path / "distances.csv") == []
