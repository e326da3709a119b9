"""The GPU report's whole course at small sizes on the CPU, and what it says of failures."""

import json

import cases
import gpu_contenders
import gpu_report
import pytest
import torch
from interleave import QUICK
from results import OURS

CPU = torch.device("cpu")
SIZES = (
    cases.Attention(2, 8, heads=2, channels=16),
    cases.Deformable(5, heads=2, channels=8, points=2, levels=((4, 6), (2, 3))),
    cases.Matching(3, layers=2, num_groups=2, num_queries=8, classes=5),
)


@pytest.fixture(scope="module")
def report():
    report = {}
    gpu_report.fill(report, CPU, [SIZES], (1, 2), ["tests/test_groups.py", "-k", "segments"], QUICK)
    return report


def test_everything_agrees(report):
    assert gpu_report.wrong(report) == []
    assert report["tests"]["status"] == "ok"
    assert "passed" in report["tests"]["summary"]
    missing = [row for row in report["times"] if row["status"] != "ok"]
    assert {(row["contender"], row["dtype"]) for row in missing} <= {("transformers", "bfloat16")}


def test_every_op_is_compared_and_timed_against_a_peer(report):
    ops = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("groupdetr_fast::")}
    assert {row["op"] for row in report["kernels"]} == ops - {"attention_dropout"}
    assert {row["dtype"] for row in report["kernels"]} == {"float32", "bfloat16"}
    timed = {(row["work"], row["contender"]) for row in report["times"]}
    for work in {work for work, _ in timed}:
        assert (work, OURS) in timed
        assert len([contender for name, contender in timed if name == work]) > 1
    assert {work for work, _ in timed} == {*gpu_report.gd.ops.backends(), "criterion"}
    for row in report["times"]:
        if row["status"] == "ok":
            assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
            assert row["contender"] != OURS or row["ratio"] == 1


def test_memory_and_graphs_are_listed_though_the_cpu_has_none(report):
    assert {row["groups"] for row in report["memory"]} == {1, 2}
    assert {row["work"] for row in report["memory"]} == {"grouped_attention", "criterion"}
    assert {row["work"]: row["status"] for row in report["CUDA graphs"]} == {
        "linear_assignment": "ok",
        "criterion": "ok",
    }
    assert all(row["host synchronisations"] is None for row in report["host synchronisations"])


def test_files(report, tmp_path):
    gpu_report.write(report, tmp_path / "device")
    assert json.loads((tmp_path / "device" / "report.json").read_text()) == report
    text = (tmp_path / "device" / "report.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| grouped_attention | K2xN8, batch 2 | float32 | groupdetr_fast |" in text


def test_units_of_tables():
    row = {"work": "a", "seconds_q1": 0.001, "seconds": 0.002, "seconds_q3": 0.003, "ratio": 1.234}
    assert gpu_report.readable(row) == {"work": "a", "ms": "2.000 (1.000 to 3.000)", "ratio": "1.23"}
    row = {"bytes": 3 << 20, "difference": None, "note": None}
    assert gpu_report.readable(row) == {"MiB": "3.0", "difference": "", "note": ""}
    assert gpu_report.markdown_table([{"a": "1"}, {"a": "2", "b": "3"}]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "| 2 | 3 |",
    ]


def test_a_wrong_kernel_is_found():
    def off_by_a_little(*inputs):
        return gpu_contenders.sigmoid_focal_loss_reference(*inputs) * 1.0001

    kernel = next(
        kernel for kernel in gpu_contenders.kernels(*SIZES, CPU, torch.float32) if kernel.name == "sigmoid_focal_loss"
    )
    (row,) = gpu_report.compare_kernels([kernel._replace(run=off_by_a_little)], torch.float32)
    assert row["status"] == "wrong"
    assert "largest error" in row["note"]


def test_a_wrong_contender_is_not_timed_and_a_failing_one_is_missing():
    def fail():
        raise torch.OutOfMemoryError("too large")

    ones = torch.ones(3)
    runs = {OURS: lambda: ones, "wrong": lambda: 2 * ones, "failing": fail}
    work = gpu_contenders.Work("work", SIZES[0], runs, lambda result: [result])
    ours, wrong, failing = gpu_report.time_works([work], torch.float32, CPU, QUICK)
    assert ours["status"] == "ok"
    assert wrong["status"] == "wrong"
    assert wrong["difference"] == 1
    assert "seconds" not in wrong
    assert (failing["status"], failing["note"]) == ("missing", "too large")


def test_without_this_package_there_is_nothing_to_compare():
    def fail():
        raise RuntimeError("no kernel")

    work = gpu_contenders.Work("work", SIZES[0], {OURS: fail, "peer": lambda: torch.ones(3)}, lambda result: [result])
    (row,) = gpu_report.time_works([work], torch.float32, CPU, QUICK)
    assert (row["status"], row["note"]) == ("wrong", "no kernel")


def test_an_unfinished_report_is_written(tmp_path):
    tests = {"command": "", "status": "ok", "summary": "", "failed": []}
    gpu_report.write({"environment": {"device": "x"}, "tests": tests}, tmp_path)
    assert (tmp_path / "report.md").read_text().count("Not measured.") == 5


def test_failing_tests_are_listed(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("def test_that_fails():\n    assert 1 == 2\n")
    row = gpu_report.run_tests([str(file)])
    assert row["status"] == "wrong"
    assert row["summary"].startswith("1 failed")
    assert len(row["failed"]) == 1
    assert "test_that_fails" in row["failed"][0]


def test_sizes_of_the_report_are_those_of_the_table():
    lists = (cases.GPU_ATTENTION, cases.GPU_DEFORMABLE, cases.GPU_MATCHING)
    assert {len(cases) for cases in lists} == {4}
    for attention, _, matching in zip(*lists, strict=True):
        assert (attention.num_groups, attention.num_queries) == (matching.num_groups, matching.num_queries)
        assert attention.batch == matching.batch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_fails_with_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu_report.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^gpu-report needs a GPU, but torch finds none \(.*\)$"):
        gpu_report.main()
    assert list(tmp_path.iterdir()) == []
