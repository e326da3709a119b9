"""Peak memory against what is known of it."""

import platform
import subprocess
import sys

import pytest

from harness.memory import peak_in_new_process
from harness.places import ROOT

KEEP_AND_GIVE_BACK = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from groupdetr_fast.training.host_memory import keep_freed_memory
from harness.memory import give_back_freed, resident
kept = keep_freed_memory()
before = resident("VmRSS")
bytearray(b"1") * (256 << 20)
freed = resident("VmRSS")
give_back_freed()
print(int(kept), freed - before, resident("VmRSS") - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_kept_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", KEEP_AND_GIVE_BACK], env={}, capture_output=True, text=True, check=True
    )
    kept, freed, given_back = map(int, done.stdout.split())
    assert kept
    assert freed > 200 << 20
    assert given_back < 20 << 20


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
