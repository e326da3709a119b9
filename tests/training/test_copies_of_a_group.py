"""Losses do not grow with the number of groups: K copies of a group train the shared weights as that one does."""

import pytest
import torch
from test_passes import MASKS, MODELS, all_at_once, set_points, small_batch, small_model

import groupdetr_fast as gd


def assert_copies_train_as_one(name, overrides, batch, **tolerance):
    one, three = (small_model(name, num_groups, **overrides) for num_groups in (1, 3))
    state = one.state_dict()
    for parameter in three.group_parameters:
        state[parameter] = torch.cat([state[parameter]] * 3)
    three.load_state_dict(state)
    expected_losses, expected = all_at_once(one, gd.build_criterion(one), [batch])
    losses, found = all_at_once(three, gd.build_criterion(three), [batch])
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for parameter in three.group_parameters:  # the copies share what the one gets
        found[parameter] = sum(found[parameter].chunk(3))
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_of_boxes(name, overrides):
    assert_copies_train_as_one(name, overrides, small_batch(3, 2), rtol=1e-6, atol=1e-8)


def test_of_masks(monkeypatch):
    set_points(monkeypatch)
    batch = small_batch(2, 3, masks=True)
    assert_copies_train_as_one("mask2former_r50", MASKS, batch, rtol=1e-4, atol=1e-6)  # it computes in float32
