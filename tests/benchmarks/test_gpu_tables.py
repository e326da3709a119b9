"""From rows of the GPU report to tables."""

import json

import pytest

from gpu import tables
from gpu.tables import GOALS_SECTION, ROWS, SECTION, STAGES
from harness.documents import ON_A_GPU, PERFORMANCE, read_section
from harness.results import OURS

ENVIRONMENT = {
    "kind": "environment",
    "status": "ok",
    "rehearsal": False,
    "device": "Card",
    "commit": "abc",
    "versions": {"torch": "2.11", "triton": "3.6"},
}


def write(folder, stage, *runs):
    lines = []
    for number, rows in enumerate(runs):
        environment = ENVIRONMENT | {"run": f"2026010{number + 1}T000000"}
        lines += [json.dumps({"run": environment["run"], "status": "ok"} | row) for row in (environment, *rows)]
    (folder / f"{stage}.jsonl").write_text("\n".join(lines) + "\n")


def time(contender, kind, microseconds, wall, **fields):
    work = {"kind": "time", "work": "op", "case": "a", "batch": 2, "dtype": "bfloat16", "dropout": 0.0}
    row = work | {"contender": contender, "pass": kind, "wall": wall * 1e-6, "host": wall * 1e-6} | fields
    return row if microseconds is None else row | {"gpu_warm": [0, microseconds * 1e-6, 1]}


def test_document_has_the_tables_of_the_rows():
    assert read_section(PERFORMANCE, GOALS_SECTION) == tables.goals(ROWS)
    assert read_section(ON_A_GPU, SECTION) == tables.document(ROWS)
    assert (ROWS / "report.md").read_text().strip().endswith(tables.document(ROWS, full=True)[-200:])


def test_another_kernel_of_ours_is_no_peer():
    names = (OURS, f"{OURS}, without tiles", "deformops, Triton")
    assert list(tables.peers(dict.fromkeys(names))) == ["deformops, Triton"]


def test_the_newest_run_that_got_somewhere_counts(tmp_path):
    rehearsal = [{"kind": "time", "rehearsal": True}]
    write(tmp_path, "ops", [time(OURS, "forward", 1, 1)], [time(OURS, "forward", 2, 2)], [])
    (run,) = tables.runs_of(tmp_path, "ops")
    assert run.rows[0]["wall"] == 2e-6
    write(tmp_path, "ops", [])
    assert tables.runs_of(tmp_path, "ops") == []
    assert tables.runs_of(tmp_path, "smoke") == []
    environment = json.dumps(ENVIRONMENT | {"run": "x", "rehearsal": True})
    (tmp_path / "ops.jsonl").write_text(f"{environment}\n{json.dumps({'run': 'x', 'status': 'ok'} | rehearsal[0])}\n")
    assert tables.runs_of(tmp_path, "ops") == []


def test_a_run_that_had_no_time_replaces_nothing(tmp_path):
    missing = {"status": "missing", "note": "no time"}
    no_work = {"kind": "time", "work": "op", "arguments": "a"} | missing
    write(tmp_path, "ops", [time(OURS, "forward", 1, 1)], [{"kind": "stage"} | missing], [no_work, no_work])
    (run,) = tables.runs_of(tmp_path, "ops")
    assert run.environment["run"] == "20260101T000000"


def write_parts(folder, *parts):
    """``parts`` are pairs of what was asked for and rows, oldest first."""
    write(folder, "ops", *(rows for _, rows in parts))
    lines = [json.loads(line) for line in (folder / "ops.jsonl").read_text().splitlines()]
    asked = iter(only for only, _ in parts)
    lines = [line | {"only": next(asked)} if line["kind"] == "environment" else line for line in lines]
    (folder / "ops.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_parts_that_were_measured_again_follow_the_whole(tmp_path):
    def pair(wall, **fields):
        return [time(name, "forward", 1, wall, **fields) for name in (OURS, "peer")]

    first, other = pair(1) + pair(1, case="b"), pair(9, case="b")
    write_parts(tmp_path, ("", first), ("b", pair(2, case="b")), ("c", pair(3, case="c")), ("b", other))
    runs = tables.runs_of(tmp_path, "ops")
    assert [run.environment["only"] for run in runs] == ["", "c", "b"]
    assert runs[-1].rows[0]["wall"] == pytest.approx(9e-6)
    kept = tables.newest_works(runs)
    assert [[row["case"] for row in run.of("time")] for run in kept] == [["a", "a"], ["c", "c"], ["b", "b"]]
    assert tables.find(runs, "op", "peer", case="b")[OURS].wall == pytest.approx(9e-6)
    assert tables.find(runs, "op", "nobody", case="b") == {}
    write_parts(tmp_path, ("b", other), ("", first))
    assert [run.environment["only"] for run in tables.runs_of(tmp_path, "ops")] == [""]


def test_a_part_with_fewer_contenders_replaces_nothing(tmp_path):
    all_peers = [time(name, "forward", 1, 1) for name in (OURS, "peer")]
    write_parts(tmp_path, ("", all_peers), ("other", [time(name, "forward", 1, 1) for name in (OURS, "other")]))
    whole, part = tables.newest_works(tables.runs_of(tmp_path, "ops"))
    assert len(whole.of("time")) == len(part.of("time")) == 2


def test_a_part_without_ways_of_ours_that_are_gone_replaces_what_has_them(tmp_path):
    before = [time(name, "forward", 1, 1) for name in (OURS, f"{OURS}, gone", "peer")]
    write_parts(tmp_path, ("", before), ("again", [time(name, "forward", 1, 1) for name in (OURS, "peer")]))
    whole, part = tables.newest_works(tables.runs_of(tmp_path, "ops"))
    assert (len(whole.of("time")), len(part.of("time"))) == (0, 2)
    write_parts(tmp_path, ("", before), ("again", [time("peer", "forward", 1, 1)]))  # ours was wrong
    whole, part = tables.newest_works(tables.runs_of(tmp_path, "ops"))
    assert (len(whole.of("time")), len(part.of("time"))) == (3, 1)


def test_a_goal_is_not_rounded_to_the_other_side():
    assert tables.goal_line("busy", "at least 0.95", 0.948, lambda value: value >= 0.95)[2:] == ["0.948", "missed"]
    assert tables.goal_line("busy", "at least 0.95", 0.94997, lambda value: value >= 0.95)[2:] == ["0.94997", "missed"]
    assert tables.goal_line("busy", "at least 0.95", 0.951, lambda value: value >= 0.95)[2:] == ["0.95", "met"]


def test_ours_beside_the_best_peer_of_each_pass(tmp_path):
    rows = [time(OURS, "forward", 10, 20), time(OURS, "both", 40, 50)]
    rows += [time("first", "forward", 15, 1), time("first", "both", 105, 100)]
    rows += [time("second", "forward", 30, 1), time("second", "both", 60, 200)]
    rows += [time("host", "forward", None, 1), time("host", "both", None, 25)]
    write(tmp_path, "ops", rows)
    (run,) = tables.runs_of(tmp_path, "ops")
    *_, line = tables.short_table(run).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == ["10.0", "-", "first", "1.50"]
    assert cells[5:9] == ["30.0", "-", "second", "1.00"]
    assert cells[9:] == ["50.0", "host", "0.50", "50.0"]
    (full,) = tables.full_tables(run)
    assert "| second | 30.0 | 3.00 | 30.0 | 1.00 | 200 | 4.00 | 200 |" in full


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_a_run_is_left_out(tmp_path, stage):
    for other in STAGES:
        if other != stage:
            (tmp_path / f"{other}.jsonl").write_text((ROWS / f"{other}.jsonl").read_text())
    headings = {line for line in tables.document(ROWS).splitlines() if line.startswith("## ")}
    left = {line for line in tables.document(tmp_path).splitlines() if line.startswith("## ")}
    assert len(headings - left) == 1
    assert left < headings
    assert (tables.goals(tmp_path) == tables.NOTHING) == (stage in ("smoke", "ops", "step"))


def test_without_rows_it_says_so(tmp_path):
    assert tables.document(tmp_path) == tables.goals(tmp_path) == "Not yet measured on a GPU."


def test_a_goal_that_was_not_measured_is_neither_met_nor_missed():
    smokes, *others = (tables.runs_of(ROWS, stage) for stage in ("smoke", "ops", "step"))
    table = tables.goals_table(smokes[-1], *others)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {line[3] for line in lines} <= {"met", "missed", "-"}
    assert all((line[2] == "not measured") == (line[3] == "-") for line in lines)


def test_tests_that_failed_are_counted_by_their_functions(tmp_path):
    failed = [
        {"kind": "test", "test": f"test_ops.py::{name}", "note": f"reason of {name}"} for name in ("a[1]", "a[2]", "b")
    ]
    counts = {"kind": "tests", "passed": 4, "failed": 3, "seconds": 9.6, "out_of_time": 2}
    write(tmp_path, "tests", [*failed, counts])
    (run,) = tables.runs_of(tmp_path, "tests")
    assert tables.tests_sentence(run) == (
        "4 passed, 3 failed, in 10 s; 2 did not begin in time. "
        "Failed: 2 of `test_ops.py::a` (reason of a[1]); 1 of `test_ops.py::b` (reason of b)."
    )
