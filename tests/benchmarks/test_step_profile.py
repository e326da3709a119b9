"""The extra time of groups falls on operators that exist, and products are told from the rest."""

import pytest

from cpu.step_profile import extra_times, share_of_products
from harness.cases import DETECTION


def test_operators_of_a_step():
    extra = extra_times(DETECTION[-1].small(), DETECTION[0].small())
    assert {"aten::mm", "aten::addmm", "aten::native_layer_norm"} <= extra.keys()
    assert list(extra.values()) == sorted(extra.values(), reverse=True)


def test_share_of_products():
    extra = {"aten::mm": 2.0, "aten::_scaled_dot_product_flash_attention_for_cpu": 1.0, "aten::add": 1.0}
    assert share_of_products(extra) == pytest.approx(0.75)
