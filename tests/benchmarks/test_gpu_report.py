"""The stages smoke and ops of the GPU report at small sizes on the CPU, its files, and what it says of failures."""

import json
import sys
from types import SimpleNamespace

import gpu_report
import pytest
import torch

import groupdetr_fast as gd
from gpu import clock, operators, ops, smoke, works
from gpu.recorder import Recorder
from harness import cases
from harness.results import OURS

CPU = torch.device("cpu")


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path, "stage", device=CPU, minutes=10, rehearsal=True, commit="abc")


def rows_of(recorder, kind=None):
    rows = [json.loads(line) for line in (recorder.folder / "stage.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


# --- The recorder ---


def test_a_run_begins_with_what_its_numbers_depend_on(recorder):
    (first,) = rows_of(recorder)
    assert first["kind"] == "environment"
    assert first["commit"] == "abc"
    assert first["versions"]["torch"] == torch.__version__
    assert first["kernels"]["linear_assignment"] == gd.ops.backends()["linear_assignment"]["cpu"]


def test_rows_are_on_disk_at_once_and_further_runs_are_appended(recorder):
    recorder.add("first", value=1)
    again = Recorder(recorder.folder, "stage", device=CPU, minutes=10)
    again.add("second", value=2)
    assert [row["kind"] for row in rows_of(recorder)] == ["environment", "first", "environment", "second"]


def test_what_fails_costs_its_row(recorder):
    for error in (ImportError("no module"), torch.OutOfMemoryError("too large"), KeyError("name")):
        with recorder.row("work", contender="peer"):
            raise error
    assert not recorder.found_wrong
    with recorder.row("work", contender="peer") as row:
        row["difference"] = 2.0
        raise AssertionError("differs")
    *missing, wrong = rows_of(recorder, "work")
    assert [row["status"] for row in missing] == ["missing"] * 3
    assert "no module" in missing[0]["note"]
    assert (wrong["status"], wrong["note"], wrong["difference"]) == ("wrong", "differs", 2.0)
    assert recorder.found_wrong


def test_without_time_the_reason_is_written(recorder):
    assert recorder.has_time("work", 1)
    assert not recorder.has_time("work", 1e6, of="everything")
    (row,) = rows_of(recorder, "work")
    assert (row["status"], row["of"]) == ("missing", "everything")
    assert row["note"].startswith("no time")


# --- Stage smoke ---


def test_every_operator_is_right_in_every_precision(recorder):
    for precision, family in smoke.FAMILIES:
        if precision != "tf32" or family in smoke.MULTIPLYING:
            smoke.check_family(recorder, precision, family)
    rows = rows_of(recorder, "operator")
    assert all(row["status"] == "ok" for row in rows)
    defined = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("groupdetr_fast::")}
    for precision in ("bfloat16", "float32", "float16"):
        checked = {row["operator"] for row in rows if row["precision"] == precision}
        assert checked == {op for op in defined if not op.endswith("_reference")} - {"attention_dropout"}
    assert all(0 <= max(row["error_over_allowed"].values()) <= 1 for row in rows)


def test_a_wrong_operator_is_found(recorder):
    maker = operators.matching(smoke.tiny(smoke.MATCHING[0]), CPU, torch.float32)
    right = next(operator for operator in maker if operator.name == "sigmoid_focal_loss")
    off = right._replace(run=lambda *inputs: right.reference(*inputs) * 1.0001)
    calls = iter(range(100))
    unsteady = right._replace(run=lambda *inputs: right.reference(*inputs) * (1 + 1e-7 * next(calls)))
    failing = right._replace(run=lambda *inputs: 1 / 0)
    for operator in (right, off, unsteady, failing):
        smoke.check(recorder, operator, "float32")
    assert [row["status"] for row in rows_of(recorder, "operator")] == ["ok", "wrong", "wrong", "wrong"]
    notes = [row.get("note", "") for row in rows_of(recorder, "operator")]
    assert "errors over allowed" in notes[1]
    assert "another result" in notes[2]
    assert "ZeroDivisionError" in notes[3]


def test_dropout_masks_and_the_criterion(recorder, monkeypatch):
    smoke.dropout_masks(recorder)
    smoke.criterion(recorder, smoke.tiny(smoke.MATCHING[0]))
    assert not recorder.found_wrong
    assert {row["different"] for row in rows_of(recorder, "dropout mask")} == {0}
    assert len(rows_of(recorder, "host synchronisations")) == 3
    monkeypatch.setattr(smoke, "keep_mask", lambda *arguments: torch.zeros(()).bool())
    smoke.dropout_masks(recorder)
    assert recorder.found_wrong


def test_gradients_of_very_negative_scores(recorder, monkeypatch):
    smoke.very_negative_scores(recorder)
    rows = rows_of(recorder, "negative_scores")
    assert [(row["way"], row["not_finite"]) for row in rows] == [("torch", 0), ("attend_under_mask", 0), ("attend", 0)]
    monkeypatch.setattr(
        smoke.layers_attention, "attend_under_mask", lambda *heads, **options: sum(heads[:3]) * torch.nan
    )
    smoke.very_negative_scores(recorder)
    assert [row["status"] for row in rows_of(recorder, "negative_scores")][3:] == ["ok", "wrong", "wrong"]


def test_families_in_processes_of_their_own(recorder, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", None, raising=False)  # spawn would run pytest again
    smoke.in_processes(recorder, [("float32", "matching"), ("float32", "deformable")])
    assert {row["operator"] for row in rows_of(recorder, "operator")} >= {"linear_assignment", "ms_deform_attn"}


def test_a_process_that_dies_is_told(recorder, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", None, raising=False)
    monkeypatch.setattr(smoke, "exit_with_the_outcome", die)
    smoke.in_processes(recorder, [("float32", "matching")])
    (row,) = rows_of(recorder, "family")
    assert (row["status"], row["note"]) == ("wrong", "its process ended with exit status 7")


def die(*arguments):
    sys.exit(7)


# --- Stage ops ---


TINY = {
    "cross attention": works.cross_attention(cases.CrossAttention(9, heads=2, map=(3, 5)), CPU, torch.float32),
    "cross attention, no padding": works.cross_attention(
        cases.CrossAttention(9, mask="none", heads=2, map=(3, 5)), CPU, torch.float32
    ),
    "attention": works.attention(cases.Attention(2, 8, heads=2, channels=16), CPU, torch.float32),
    "dropout": works.attention(cases.Attention(2, 8, heads=2, channels=16), CPU, torch.float32, 0.5),
    "dropout, half": works.attention(cases.Attention(2, 8, heads=2, channels=16), CPU, torch.bfloat16, 0.5),
    "deformable": works.deformable(cases.GPU_DEFORMABLE[0].small(), CPU, torch.float32),
    "deformable, half": works.deformable(cases.GPU_DEFORMABLE[0].small(), CPU, torch.bfloat16),
}
SMALL = cases.Matching(3, layers=2, num_groups=2, num_queries=8, classes=5)
TINY["cost"] = works.matching_cost(SMALL, CPU, torch.float32)
TINY["assignment"] = works.assignment(SMALL, CPU)
TINY["class loss"] = works.class_loss(SMALL, CPU, torch.float32)
TINY["criterion"] = works.criterion(SMALL, CPU)


@pytest.mark.parametrize("name", TINY)
def test_contenders_agree_and_are_timed(recorder, name):
    ops.measure(recorder, TINY[name])
    timed = [row for row in rows_of(recorder, "time") if row["status"] == "ok"]
    contenders = {row["contender"] for row in timed}
    assert OURS in contenders
    assert len(contenders) > 1
    for way in ("products", "without tiles"):
        assert (f"{OURS}, {way}" in contenders) == (name == "deformable, half")
    assert (f"{OURS}, shared sort" in contenders) == name.startswith("deformable")
    assert not recorder.found_wrong
    for row in timed:
        assert row["wall"] >= row["host"] > 0
        if "graph" not in row:
            for state in ("warm", "cold"):
                assert 0 < row[f"gpu_{state}"][0] <= row[f"gpu_{state}"][1] <= row[f"gpu_{state}"][2]
    passes = {"forward", "both"} if name not in ("cost", "assignment") else {"forward"}
    assert {row["pass"] for row in timed} == passes


def test_a_wrong_contender_is_not_timed_and_a_failing_one_is_missing(recorder):
    def fail(x):
        raise torch.OutOfMemoryError("too large")

    runs = {OURS: lambda x: x, "wrong": lambda x: 2 * x, "failing": fail}
    contenders = {name: works.ready(run) for name, run in runs.items()}
    fields = {"case": "a", "dtype": "float32"}
    ops.measure(recorder, works.Work("work", fields, (torch.ones(3),), contenders, works.as_is, lambda x: [x]))
    statuses = {row["contender"]: row["status"] for row in rows_of(recorder, "agreement")}
    assert statuses == {OURS: "ok", "wrong": "wrong", "failing": "missing"}
    assert {row["contender"] for row in rows_of(recorder, "time")} == {OURS}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


@pytest.mark.parametrize(("is_random", "peers"), [(False, True), (True, True), (False, False)])
def test_wrong_gradients_are_not_timed(recorder, is_random, peers):
    """Those of peers may be others where what they drop is random, or where the work says so."""
    runs = {OURS: lambda x: 2 * x, f"{OURS}, wrong": WrongGradient.apply, "peer": WrongGradient.apply}
    contenders = {name: works.ready(run) for name, run in runs.items()}
    fields, inputs = {"case": "a", "dtype": "float32"}, (torch.ones(3, requires_grad=True),)
    outcome = None if is_random else lambda x: [x]
    ops.measure(recorder, works.Work("work", fields, inputs, contenders, works.as_is, outcome, peers))
    compared = peers and not is_random
    statuses = {row["contender"]: row["status"] for row in rows_of(recorder, "agreement") if "pass" in row}
    assert statuses == {OURS: "ok", f"{OURS}, wrong": "wrong"} | ({"peer": "wrong"} if compared else {})
    timed = {(row["contender"], row["pass"]) for row in rows_of(recorder, "time")}
    assert {name for name, kind in timed if kind == "forward"} == set(runs)
    assert {name for name, kind in timed if kind == "both"} == {OURS} | (set() if compared else {"peer"})


def test_only_what_was_asked_for_is_measured(tmp_path):
    asked = Recorder(
        tmp_path, "stage", device=CPU, minutes=10, rehearsal=True, only="^matching_cost|attention .*K11xN16.*float32"
    )
    ops.run(asked)
    assert [row["of"] for row in rows_of(asked, "work")] == ["matching_cost", "attention"]
    times = rows_of(asked, "time")
    assert {(row["work"], row["dtype"]) for row in times} == {
        ("matching_cost", "float32"),
        ("grouped_attention", "float32"),
    }


def test_what_is_planned_has_every_op_and_both_batches(recorder):
    recorder.rehearsal = False
    planned = list(ops.planned(recorder))
    assert {make.func.__name__ for _, make in planned} == {
        *(
            "attention",
            "cross_attention",
            "deformable",
            "assignment",
            "criterion",
            "matching_cost",
            "class_loss",
            "compiled",
        )
    }
    assert {make.args[0].batch for _, make in planned} == set(cases.GPU_BATCHES)
    assert {case.targets for _, make in planned if isinstance(case := make.args[0], cases.Matching)} == {20, 60, 100}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["smoke", "ops"])
def test_rehearsal(tmp_path, stage):
    assert gpu_report.main([stage, "--results", str(tmp_path), "--rehearse", "--minutes", "20"]) == 0
    rows = [json.loads(line) for line in (tmp_path / f"{stage}.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} <= {"ok", "missing"}
    assert not [row for row in rows if "no time" in row.get("note", "")]


def test_captured_work_returns_the_last_result():
    calls = iter(range(100))
    captured = clock.capture([lambda: next(calls)] * 3, CPU)
    assert captured.calls == 3
    assert [captured.replay(), captured.replay()] == [2, 5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_fails_with_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main(["smoke", "--results", str(tmp_path)])
    assert stopped.value.code == 1
    assert "needs a GPU, but torch finds none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_stages_share_their_minutes(tmp_path, monkeypatch):
    """Each takes its usual time at most, the last one what is left; what has no time has a row that says so."""
    clock = [100.0]
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: clock[0])

    def minutes(*arguments):
        recorded.clear()
        assert gpu_report.main([*arguments, "--results", str(tmp_path), "--rehearse"]) == 0
        return recorded

    recorded, added = [], []

    class Noted:
        found_wrong = False

        def __init__(self, folder, stage, *, minutes, **others):
            recorded.append((stage, minutes))

        def add(self, kind, **fields):
            added.append((recorded[-1][0], kind, fields["status"]))

    def import_module(name):
        return SimpleNamespace(run=lambda recorder: clock.__setitem__(0, clock[0] + 60))

    monkeypatch.setattr(gpu_report, "Recorder", Noted)
    monkeypatch.setattr(gpu_report.importlib, "import_module", import_module)
    usual = gpu_report.MINUTES
    assert minutes("smoke", "step") == [("smoke", usual["smoke"]), ("step", usual["step"])]
    assert minutes("smoke", "ops", "step", "--minutes", "9") == [
        ("smoke", usual["smoke"]), ("ops", usual["ops"]), ("step", 7.0)
    ]  # fmt: skip
    assert minutes("smoke", "ops", "smoke", "--minutes", "9") == [
        ("smoke", usual["smoke"]), ("ops", usual["ops"]), ("smoke", 7.0)
    ]  # fmt: skip
    assert minutes("smoke", "--minutes", "4") == [("smoke", 4.0)]
    assert added == []
    assert minutes("ops", "step", "tune", "--minutes", "1.5") == [("ops", 1.5), ("step", 0.5), ("tune", 0.0)]
    assert added == [("tune", "stage", "missing")]
    assert [stage for stage, _ in minutes("all")] == list(usual)


def test_a_stage_without_time_has_a_row(tmp_path):
    assert gpu_report.main(["tune", "--minutes", "0", "--results", str(tmp_path), "--rehearse"]) == 0
    first, row = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert (first["kind"], row["kind"], row["status"], row["run"]) == ("environment", "stage", "missing", first["run"])
    assert row["note"].startswith("no time")
