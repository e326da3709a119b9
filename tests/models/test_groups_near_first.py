"""New groups that begin near group 0."""

import pytest
import torch
from small_detectors import outputs, padded_batch, small_detector
from test_groups_of_detectors import MODELS

from groupdetr_fast.groups import rows_near_first_group

SIZE = 6  # queries of a group


def of_groups(model, name):
    return model.get_parameter(name).detach().unflatten(0, (model.config.num_groups, -1)).clone()


@pytest.mark.parametrize("name", MODELS)
def test_without_noise_groups_are_equal_and_predict_the_same(name):
    model = small_detector(name).eval()
    before = {key: of_groups(model, key) for key in model.group_parameters}
    others = {key: value.clone() for key, value in model.state_dict().items() if key not in model.group_parameters}
    model.start_groups_near_first(0.0)
    for key in model.group_parameters:
        assert torch.equal(of_groups(model, key), before[key][:1].expand_as(before[key]))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())
    assert any(not torch.equal(groups[0], groups[1]) for groups in before.values())
    with torch.no_grad():
        predicted = outputs(model(*padded_batch(), num_groups=3)).unflatten(2, (3, SIZE))
    torch.testing.assert_close(predicted[:, :, 1], predicted[:, :, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predicted[:, :, 2], predicted[:, :, 0], rtol=1e-4, atol=1e-5)


def test_noise_is_relative_to_the_values_of_group_0():
    torch.manual_seed(0)
    rows = 5 + 3 * torch.randn(4 * 500, 16)
    near = rows_near_first_group(rows, 4, 0.1).unflatten(0, (4, 500))
    assert torch.equal(near[0], rows[:500])
    for group in near[1:]:
        assert (group - near[0]).std().item() == pytest.approx(0.3, rel=0.03)
        assert (group - near[0]).mean().item() == pytest.approx(0, abs=0.02)
    assert (near[1] - near[2]).std().item() == pytest.approx(0.3 * 2**0.5, rel=0.03)  # noise of their own


def test_groups_that_are_trained_stay():
    torch.manual_seed(0)
    rows = torch.randn(4 * 2, 3)
    near = rows_near_first_group(rows, 4, 0.5, trained=2)
    assert torch.equal(near[:4], rows[:4])
    assert not torch.isclose(near[4:], rows[4:]).any()
    assert torch.equal(rows_near_first_group(rows, 4, 0.5, trained=9), rows)


def test_one_group_stays_as_it_is_and_draws_nothing():
    model = small_detector("mask2former_r50", num_groups=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.start_groups_near_first(0.1)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_negative_noise_is_refused(noise):
    with pytest.raises(ValueError, match="noise must not be negative, got"):
        small_detector("dab_detr_r50").start_groups_near_first(noise)


@pytest.mark.parametrize(
    ("name", "queries"),
    [
        ("conditional_detr_r50", {"query_embed.weight"}),
        ("dab_detr_r50", {"refpoint_embed.weight"}),
        ("dn_detr_r50", {"refpoint_embed.weight"}),
        ("dab_deformable_detr_r50", {"refpoint_embed.weight", "tgt_embed.weight"}),
        ("dino_4scale_r50", {"tgt_embed.weight"}),
        ("mask2former_r50", {"query_feat.weight", "query_embed.weight"}),
    ],
)
def test_detectors_know_their_learned_queries(name, queries):
    model = small_detector(name)
    assert {key for key, _ in model.named_parameters() if model.is_query(key)} == queries
