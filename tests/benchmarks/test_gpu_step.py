"""The stage ``step`` of the GPU report, rehearsed: every row is there, and what fails costs its row alone."""

import json
import re
import time
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from gpu import step, training_step
from gpu.recorder import Recorder
from groupdetr_fast import QueryGroups
from harness import naive
from harness.results import OURS

CPU = torch.device("cpu")


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path, "step", device=CPU, minutes=10, rehearsal=True)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def conditional(recorder, one_thread):
    """Steps with 1 and with 11 groups."""
    batch = step.Batch(2, recorder)
    return [step.Step(training, batch) for training in step.build(recorder, step.CONDITIONAL)]


def rows_of(recorder, kind):
    rows = [json.loads(line) for line in (recorder.folder / "step.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_times_of_groups_and_of_masks(recorder, conditional):
    one, many = conditional
    walls = step.time_steps(recorder, (one, many, step.masked(many.training, many.batch)))
    rows = rows_of(recorder, "step")
    assert [(row["groups"], row["contender"], row["status"]) for row in rows] == [
        (1, OURS, "ok"),
        (11, OURS, "ok"),
        (11, "masked SDPA", "ok"),
    ]
    assert all(0 < row["host"] <= row["wall"] for row in rows)
    assert all(row["ratio"] > 0 and row["ratio_to"] == f"{OURS}, K = 1" for row in rows[1:])
    assert 0 < rows[2]["difference"] < training_step.TOLERANCE
    assert walls == {1: rows[0]["wall"], 11: rows[1]["wall"]}


def test_a_step_attends_to_images_by_torch_if_asked_to(conditional, monkeypatch):
    """As on a GPU, where a kernel of the op serves otherwise."""
    many = conditional[1]
    monkeypatch.setattr(training_step.layers_attention, "is_preferred", lambda *_: True)
    calls = mock.Mock(wraps=training_step.ops.cross_attention)
    monkeypatch.setattr(training_step.ops, "cross_attention", calls)
    way = step.attending_by_torch(many.training, many.batch)
    way.losses()
    assert calls.call_count == 0
    with way.patched():  # cuDNN's kernel may serve, whatever the keys
        assert training_step.layers_attention.attend_under_mask is F.scaled_dot_product_attention
    assert training_step.difference(way) < training_step.TOLERANCE
    count = calls.call_count
    assert count > 0  # by the step that it is compared with
    assert step.in_graph(way).difference() == 0  # from the same step without a graph
    assert calls.call_count == count


def test_a_step_trains(conditional):
    many = conditional[1]
    weight = many.training.model.query_embed.weight
    before = weight.detach().clone()
    assert many().isfinite()
    assert (weight != before).any()
    assert weight.grad is None


def test_steps_as_graphs(recorder, conditional):
    step.measure_graphs(recorder, [one.training for one in conditional], conditional[0].batch)
    graph = "CUDA graph"
    rows = [(row["groups"], row["contender"], row.get("ratio_to"), row["status"]) for row in rows_of(recorder, "step")]
    assert rows == [
        (1, OURS, None, "ok"),
        (1, graph, f"{OURS}, K = 1", "ok"),
        (11, OURS, None, "ok"),
        (11, graph, f"{OURS}, K = 11", "ok"),
        (1, graph, None, "ok"),
        (11, graph, f"{graph}, K = 1", "ok"),
        (1, f"{graph} without the check", None, "ok"),
        (11, f"{graph} without the check", f"{graph} without the check, K = 1", "ok"),
        (11, graph, None, "ok"),
        (11, f"{graph}, torch's attention to images", f"{graph}, K = 11", "ok"),
        (11, f"{graph}, weights cast one by one", f"{graph}, K = 11", "ok"),
    ]
    kernels = rows_of(recorder, "kernels")
    assert [(row["groups"], row["contender"], row["status"]) for row in kernels] == [
        (11, graph, "ok"),
        (1, graph, "ok"),
        (11, f"{graph}, torch's attention to images", "ok"),
    ]
    assert all(row["gpu_busy_unprofiled"] > 0 for row in kernels[:2])


def test_a_graph_with_another_loss_is_wrong(recorder, conditional):
    graphed = training_step.in_graph(conditional[0])
    add_gradients = graphed.graphs.step.add_gradients

    def doubled(batches):
        (losses,), norm = add_gradients(batches)
        return [{name: 2 * value for name, value in losses.items()}], norm

    graphed.graphs.step.add_gradients = doubled
    step.time_steps(recorder, (graphed,))
    (row,) = rows_of(recorder, "step")
    assert row["status"] == "wrong"
    assert row["note"].startswith("the loss differs")


@pytest.mark.parametrize(("only", "models"), [("graph", list(step.GROUPS)), ("graph of dino", [step.DINO])])
def test_graphs_alone_can_be_measured(tmp_path, one_thread, monkeypatch, only, models):
    recorder = Recorder(tmp_path, "step", device=CPU, minutes=10, rehearsal=True, only=only)
    measured = []
    monkeypatch.setattr(step, "measure_graphs", lambda recorder, trainings, batch: measured.append(trainings[0].name))
    step.run(recorder)
    assert measured == models * 2  # with few images and with many
    assert rows_of(recorder, "step") == []


def test_attention_across_groups_is_wrong(recorder, conditional):
    def across_groups(query, key, value, groups, *, dropout_p=0.0):
        return naive.masked_sdpa(query, key, value, QueryGroups(1, query.shape[1]), dropout_p=dropout_p)

    many = conditional[1]
    step.time_steps(recorder, (step.Step(many.training, many.batch, "across groups", attention=across_groups),))
    (row,) = rows_of(recorder, "step")
    assert row["status"] == "wrong"
    assert row["note"].startswith("attention differs")
    assert recorder.found_wrong


def test_a_wrong_criterion_is_wrong(recorder, conditional):
    one = conditional[0]

    def doubled(output, batch):
        losses = one.training.criterion(output, batch.packed())
        return {name: 2 * value for name, value in losses.items()}

    step.time_steps(recorder, (step.Step(one.training, one.batch, "doubled", criterion=doubled),))
    (row,) = rows_of(recorder, "step")
    assert row["status"] == "wrong"


@pytest.mark.parametrize("calls", [0, 9], ids=["at once", "in a round"])
def test_what_fails_costs_its_row_alone(recorder, conditional, calls):

    class Failure(Exception):
        """Like Triton's errors, of no known kind."""

    left = calls

    def fail(*arguments, **options):
        nonlocal left
        if not left:
            raise Failure("no kernel")
        left -= 1
        return naive.masked_sdpa(*arguments, **options)

    one = conditional[0]
    failing = step.Step(one.training, one.batch, "failing", attention=fail)
    step.time_steps(recorder, (one, failing))
    rows = {row["contender"]: row for row in rows_of(recorder, "step")}
    assert rows[OURS]["status"] == "ok"
    assert (rows["failing"]["status"], rows["failing"]["note"]) == ("missing", "Failure: no kernel")


def test_other_rows(recorder, conditional):
    step.measure_memory(recorder, [*conditional, step.in_passes(conditional[1].training, conditional[1].batch)])
    step.count_syncs(recorder, conditional[1:])
    step.profile_kernels(recorder, conditional[1:], {11: 1.0})
    step.time_parts(recorder, conditional[1:])
    memory = rows_of(recorder, "memory")
    assert [(row["status"], row["groups"], row["contender"]) for row in memory] == [
        ("ok", 1, OURS),
        ("ok", 11, OURS),
        ("ok", 11, "groups_per_pass=1"),
    ]
    weights = sum(parameter.numel() * 4 for parameter in conditional[1].training.model.parameters())
    assert memory[1]["static_bytes"] == pytest.approx(3 * weights, rel=0.02)
    assert [(row["status"], row["work"]) for row in rows_of(recorder, "syncs")] == [("ok", "criterion"), ("ok", "step")]
    (kernels,) = rows_of(recorder, "kernels")
    assert kernels["status"] == "ok"
    assert 0 < kernels["gpu_busy"] <= 1
    assert kernels["gpu_busy_unprofiled"] == kernels["seconds"]
    assert len(kernels["most"]) == 10
    assert kernels["most"][0]["seconds"] >= kernels["most"][9]["seconds"] > 0
    (parts,) = rows_of(recorder, "parts")
    assert list(parts)[-6:] == ["backbone", "encoder", "decoder", "criterion", "backward", "optimiser"]


def test_busy_time():
    assert step.busy_time([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (5.5, 6.0)]) == (5.0, 0.0, 7.0)


def test_what_takes_too_long_is_stopped():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="not done within 1 s"), step._within(1):
        time.sleep(30)
    assert time.monotonic() - start < 10


def test_without_time_every_row_is_missing(tmp_path, one_thread):
    recorder = Recorder(tmp_path, "step", device=CPU, minutes=0, rehearsal=True)
    step.run(recorder)
    rows = rows_of(recorder, "step")
    assert {row["status"] for row in rows} == {"missing"}
    assert all(row["note"].startswith("no time") for row in rows)
    assert (step.CONDITIONAL, 11, 2, "folded SDPA") in {
        (row["model"], row["groups"], row["batch"], row["contender"]) for row in rows
    }


@pytest.mark.slow  # half a minute
def test_the_whole_stage(recorder):
    step.run(recorder)
    rows = rows_of(recorder, "step")
    assert not recorder.found_wrong
    found = {(row["model"], row["groups"], row["batch"], row["contender"]) for row in rows if row["status"] == "ok"}
    for model, groups in step.GROUPS.items():
        for batch in (2, 3):
            assert {(model, number, batch, OURS) for number in groups} <= found
            assert (model, groups[-1], batch, "masked SDPA") in found
        assert {(model, number, 2, "without the check") for number in groups} <= found
    for contender in (
        "folded SDPA",
        "torch's attention to images",
        "groups_per_pass=1",
        "torch.compile of the decoder",
        "torch.compile",
        "CUDA graph, torch.compile",
    ):
        assert (step.CONDITIONAL, 11, 2, contender) in found
    missing = {(row["model"], row["contender"]): row["note"] for row in rows if row["status"] == "missing"}
    assert "denoising" in missing.pop((step.DINO, "folded SDPA"))
    peers = {(step.CONDITIONAL, f"criterion of {name}") for name in ("transformers", "rfdetr")}
    assert missing.keys() <= peers
    assert all(re.search("No module named '(transformers|rfdetr)'", note) for note in missing.values())
    for kind in ("memory", "syncs", "kernels", "parts"):
        assert {row["status"] for row in rows_of(recorder, kind)} == {"ok"}
