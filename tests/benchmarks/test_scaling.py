"""The cost model of many GPUs: its collectives against known formulas, and the document that shows its tables."""

import pytest

from harness.documents import read_section
from paper import scaling
from paper.scaling import GPUS, NETWORK, NVLINK, Cluster, epoch, limit, step, weights


def test_document_has_the_tables_that_the_script_prints():
    assert read_section(scaling.DOCUMENT, scaling.SECTION) == scaling.tables()


@pytest.mark.parametrize("gpus", GPUS)
def test_an_all_reduce_sends_what_a_ring_sends(gpus):
    """2 (n - 1) / n of the bytes, of which a part stays in the node."""
    link = Cluster(gpus).all_reduce(1e9)
    assert link.local + link.remote == pytest.approx(2 * (gpus - 1) / gpus * 1e9)
    assert link.seconds >= max(link.local / NVLINK, link.remote / NETWORK)
    assert (link.remote == 0) == (gpus == 8)


def test_more_gpus_make_a_step_no_shorter_and_an_epoch_shorter():
    steps = [sum(step(Cluster(gpus)).values()) for gpus in GPUS]
    assert steps == sorted(steps)
    epochs = [sum(epoch(Cluster(gpus)).values()) for gpus in GPUS]
    assert epochs == sorted(epochs, reverse=True)
    few, many = epoch(Cluster(8)), epoch(Cluster(512))
    assert many["computing"] == pytest.approx(few["computing"] / 64, rel=0.01)
    assert many["metric"] == pytest.approx(few["metric"], rel=0.1)  # which one process computes
    assert limit(many).startswith("metric, ")


def test_sharding_sends_half_as_much_again(monkeypatch):
    """Seconds of sending that nothing hides, where the links are so slow that nothing else counts."""
    monkeypatch.setattr(scaling, "NVLINK", 1.0)
    monkeypatch.setattr(scaling, "NETWORK", 1.0)
    total, trained = weights("conditional_detr_r50")
    assert 0.9 < trained / total < 1  # the first stages of the backbone are frozen
    whole, sharded = (step(Cluster(64), sharded=each)["gradients"] for each in (False, True))
    assert whole == pytest.approx(2 * 4 * trained * 63 / 64, rel=1e-6)  # scattered and gathered, in float32
    assert sharded / whole == pytest.approx(1.5, rel=0.05)
