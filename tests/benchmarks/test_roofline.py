"""The floors on paper: how bytes are counted, what is known of them otherwise, and the document that shows them."""

from dataclasses import replace

import pytest
import torch

from harness.documents import GPU_KERNELS, read_section
from paper import roofline
from paper.roofline import SETTINGS, Demand, Traffic, attention, plain_attention

CONDITIONAL = SETTINGS[0]


def test_document_has_the_tables_that_the_script_prints():
    section = read_section(GPU_KERNELS, roofline.SECTION)
    if roofline.TORCH not in section:
        pytest.skip(f"the document counts the operators of another torch than {roofline.TORCH}")
    assert section == roofline.tables()


def traffic(run):
    with Traffic() as counted:
        run()
    return counted.bytes


def test_traffic_counts_operands_and_results():
    x, y = (torch.empty(10, 20, device="meta") for _ in range(2))
    size = 10 * 20 * 4
    assert traffic(lambda: x + y) == 3 * size
    assert traffic(lambda: x.add_(y)) == 3 * size
    assert traffic(lambda: x.t().unflatten(0, (4, 5))[:, 2:]) == 0
    assert traffic(lambda: torch.empty_like(x)) == 0
    assert traffic(lambda: torch.zeros_like(x)) == 2 * size
    assert traffic(lambda: x + y[:1].expand_as(x)) == 3 * size  # its memory is all that it can touch
    assert traffic(lambda: x + torch.empty(1, 20, device="meta").expand_as(x)) == 2 * size + 20 * 4


def test_work_is_bound_by_the_slowest():
    assert Demand(roofline.MEMORY_BANDWIDTH, 0).seconds == 1
    assert Demand(1, roofline.VECTOR_PEAK * 2).seconds == 2
    assert Demand(1, 1, exponentials=roofline.EXPONENTIAL_PEAK * 3).seconds == 3
    assert Demand(1, 1, integers=roofline.INTEGER_PEAK * 4).seconds == 4
    assert (Demand(1e9, 1).bound, Demand(1, 1e12).bound) == ("memory", "compute")
    assert (Demand(1, 1, exponentials=1e9).bound, Demand(1, 1, integers=1e9).bound) == ("exponentials", "integers")


def test_peak_of_exponentials_is_the_published_one():
    assert pytest.approx(3.9e12, rel=0.01) == roofline.EXPONENTIAL_PEAK  # FlashAttention-3


def test_attention_is_bound_by_exponentials_in_long_groups_and_dropout_changes_no_bound():
    dino = SETTINGS[2]
    assert attention(CONDITIONAL, True).bound == "memory"
    assert [attention(dino, backward).bound for backward in (False, True)] == ["exponentials", "compute"]
    cycles = 2 * 8 * 11 * 900 * 900 / (16 * 132)
    assert attention(dino, False).seconds == pytest.approx(cycles / roofline.CLOCK)
    for backward in (False, True):
        plain, dropped = (attention(CONDITIONAL, backward, p) for p in (0.0, 0.1))
        assert plain.integers == 0
        assert dropped == replace(plain, integers=dropped.integers)
        assert dropped.bound == plain.bound
    scores = 2 * 8 * 11 * 300 * 300
    assert [attention(CONDITIONAL, backward, 0.1).integers for backward in (False, True)] == [3 * scores, 7 * scores]


def test_explicit_mask_keeps_the_scores():
    """665 MiB of float32 scores for 11 groups of 300, two images and 8 heads: half as many bytes in bfloat16."""
    _, plain = roofline.kept_for_backward(CONDITIONAL)
    scores = 2 * 8 * 3300 * 3300 * 2
    assert scores / 2**20 == pytest.approx(665 / 2, rel=0.01)
    assert scores <= plain < 1.1 * scores


@pytest.mark.parametrize("backward", [False, True])
def test_groups_cost_in_proportion_and_a_mask_with_the_square(backward):
    twice = replace(CONDITIONAL, num_groups=22)
    assert attention(twice, backward).operations == 2 * attention(CONDITIONAL, backward).operations
    assert attention(twice, backward).bytes == 2 * attention(CONDITIONAL, backward).bytes
    plain = plain_attention(twice, backward).bytes / plain_attention(CONDITIONAL, backward).bytes
    assert plain == pytest.approx(4, rel=0.05)
    one_group = replace(CONDITIONAL, num_groups=1)
    assert attention(one_group, False).operations == plain_attention(one_group, False).operations
