"""Weights of classes, and images that come more often."""

import math
from collections import Counter

import pytest
import torch

from groupdetr_fast.data import CocoDataset, EpochSampler
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.data.rare_classes import balanced_weights, repeat_factors


@pytest.mark.parametrize("beta", [0.9, 0.999, 1.0])
def test_weights_are_inverse_to_the_effective_number(beta):
    counts = [1, 10, 0, 5000]
    weights = balanced_weights(torch.tensor(counts), beta)
    effective = [sum(beta**power for power in range(count)) for count in counts]  # the sum that equation 3 is of
    for index in (1, 3):
        assert weights[0] / weights[index] == pytest.approx(effective[index] / effective[0])
    assert weights[2] == 1
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) == pytest.approx(sum(counts))
    assert weights[0] > weights[1] > weights[3]


def test_equal_classes_have_weight_1():
    assert balanced_weights(torch.tensor([7, 7, 7]), 0.999) == pytest.approx([1, 1, 1])
    assert balanced_weights(torch.tensor([0, 0]), 0.999) == [1, 1]


def test_factors_are_those_of_the_rarest_class_of_an_image():
    # class 0 in all of four images, class 1 in one, twice, class 2 in two
    labels, images = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 2, 2, 2, 3])
    assert repeat_factors(labels, images, 4, 0.5).tolist() == pytest.approx([1, 1, math.sqrt(2), 1])
    assert repeat_factors(labels, images, 4, 1.0).tolist() == pytest.approx([1, 1, 2, math.sqrt(2)])
    assert repeat_factors(labels[:0], images[:0], 4, 1.0).tolist() == [1, 1, 1, 1]


def test_a_data_set_knows_its_classes(content, write):
    dataset = CocoDataset(*write(content))
    assert dataset.objects_of_classes().tolist() == [2, 0, 1]  # car, cat (a crowd), toothbrush
    # the car in two of four images, the toothbrush in one of them
    assert dataset.repeat_factors(1.0).tolist() == pytest.approx([2, math.sqrt(2), 1, 1])


def test_every_epoch_has_the_same_number_and_each_sample_its_share():
    repeats = torch.tensor([1.0, 2.5, 1.0, 1.3, 4.0])
    sampler = EpochSampler(range(50), seed=1, indices=[7, 8, 9, 10, 11], repeats=repeats)
    assert len(sampler) == 10  # 9.8
    total = Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == 10
        assert len(set(keys)) == 10  # so that each is augmented in its own way
        assert {key[0] % 1_000_000 for key in keys} == {epoch}
        found = Counter(index for _, index in keys)
        assert set(found) == {7, 8, 9, 10, 11}
        assert all(abs(found[index] - share) < 1.2 for index, share in zip(range(7, 12), repeats.tolist(), strict=True))
        total += found
        assert list(sampler) == keys
    means = [total[index] / 400 for index in range(7, 12)]
    assert means == pytest.approx((repeats * 10 / 9.8).tolist(), abs=0.1)


def test_orders_differ_between_epochs_and_seeds():
    def order(seed, epoch):
        sampler = EpochSampler(range(20), seed=seed, repeats=torch.full((20,), 1.5))
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    still = EpochSampler(range(4), shuffle=False, repeats=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert [index for _, index in still] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("repeats", [[1.0, 0.5], [1.0], [1.0, 1.0, 1.0]])
def test_wrong_repeats_are_refused(repeats):
    with pytest.raises(ValueError, match="repeats must be 2 numbers of at least 1"):
        EpochSampler(range(2), repeats=torch.tensor(repeats))


def test_a_threshold_is_a_share():
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"repeat_factor_threshold must be a share in \[0, 1\]"):
            DataConfig(repeat_factor_threshold=wrong)
