"""Peak memory against what is known of it."""

import pytest

from harness.memory import peak_in_new_process


@pytest.mark.slow
def test_explicit_scores_are_seen_and_ours_do_not_exist():
    scores = 2 * 8 * 900 * 900 * 4  # of 3 groups of 300
    ours, explicit = (
        peak_in_new_process("cpu.bench_grouped_attention", "K3xN300", contender).bytes
        for contender in ("groupdetr_fast", "explicit mask")
    )
    assert ours < scores / 2 < 2 * scores < explicit < 6 * scores


@pytest.mark.slow
def test_what_cannot_run_is_missing():
    peak = peak_in_new_process("cpu.bench_grouped_attention", "K1xN300", "FlexAttention", small=True)
    assert (peak.status, peak.bytes) == ("missing", None)
    assert "backward" in peak.note
