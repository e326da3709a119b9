"""The stage of the GPU report that runs tests: what it selects, and what it says of tests that fail."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gpu import tests as stage
from gpu.recorder import Recorder
from harness.places import ROOT

FAILING = """
import pytest
from groupdetr_fast.testing import assert_matches_reference
import torch

def test_passes(): pass
def test_fails(): assert 1 == 2, "first\\nsecond"
def test_is_imprecise(): assert_matches_reference(torch.tensor([1.5]), torch.exp, torch.zeros(1))
def test_skips(): pytest.skip("a reason")
@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_breaks(broken): pass
"""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No workers, which take long to begin; undone by ``monkeypatch.undo``."""
    monkeypatch.setattr(stage, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()][1:]


def make_recorder(folder, minutes=1.0):
    return Recorder(folder, "tests", device=torch.device("cpu"), minutes=minutes, rehearsal=True, commit="none")


@pytest.mark.parametrize("workers", [False, True])
def test_rows_of_failures_and_of_what_cannot_be_imported(tmp_path, monkeypatch, workers):
    if workers:
        pytest.importorskip("xdist")
        monkeypatch.undo()
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")  # as in a test that a worker runs
    (tmp_path / "test_it.py").write_text(FAILING)
    (tmp_path / "test_absent.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "test_broken.py").write_text("1 / 0\n")
    recorder = make_recorder(tmp_path / "results")
    stage.run_tests(recorder, [str(tmp_path)])
    *rows, summary = rows_of(tmp_path / "results")
    found = {row["test"].rpartition("/")[2]: row for row in rows}
    assert found.keys() == {
        "test_absent.py",
        "test_broken.py",
        "test_it.py::test_fails",
        "test_it.py::test_is_imprecise",
        "test_it.py::test_breaks",
    }
    absent = found.pop("test_absent.py")
    assert (absent["status"], absent["note"]) == ("missing", "a_package_that_is_not_there is not installed")
    assert all(row["status"] == "wrong" for row in found.values())
    assert "ZeroDivisionError" in found["test_broken.py"]["note"]
    assert found["test_it.py::test_fails"]["note"] == "AssertionError: first"
    assert found["test_it.py::test_is_imprecise"]["error_over_allowed"] > 1e5
    assert found["test_it.py::test_breaks"]["note"] == "RuntimeError: no fixture"
    counts = {key: summary[key] for key in ("passed", "failed", "skipped", "out_of_time", "not_collected")}
    assert counts == {"passed": 1, "failed": 3, "skipped": 1, "out_of_time": 0, "not_collected": 2}
    assert summary["status"] == "ok"
    assert recorder.found_wrong
    assert (tmp_path / "results" / "tests.xml").is_file()


def test_no_test_starts_after_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "RESERVE", 120)  # seconds that pytest has to begin and to end, on a busy machine
    (tmp_path / "test_it.py").write_text("def test_it(): assert False\n")
    stage.run_tests(make_recorder(tmp_path, minutes=stage.RESERVE / 60), [str(tmp_path)])
    (summary,) = rows_of(tmp_path)
    assert summary["out_of_time"] == 1
    assert summary["failed"] == 0


def test_a_test_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "RESERVE", -100)
    (tmp_path / "test_it.py").write_text("import time\ndef test_it(): time.sleep(100)\n")
    stage.run_tests(make_recorder(tmp_path, minutes=4 / 60), [str(tmp_path)])
    (summary,) = rows_of(tmp_path)
    assert summary["note"] == "ended where the time was over"
    assert summary["seconds"] < 20


@pytest.mark.slow
def test_nothing_selected_is_wrong(tmp_path):
    stage.run_tests(make_recorder(tmp_path), ["tests/test_groups.py", "-k", "nothing_has_this_name"])
    (summary,) = rows_of(tmp_path)
    assert summary["status"] == "wrong"
    assert "status 5" in summary["note"]


@pytest.mark.parametrize(
    ("only", "files"), [("captured", ["tests/training/test_captured_graphs.py"]), ("dino_4scale", [])]
)
def test_files_are_chosen_by_their_names(only, files, tmp_path, monkeypatch):
    """With none of that name nothing runs, where pytest would run everything."""
    started = []
    monkeypatch.setattr(stage, "run_tests", lambda recorder, arguments: started.append(arguments))
    stage.run(Recorder(tmp_path, "tests", device=torch.device("cpu"), minutes=1.0, only=only))
    assert started == ([("-m", "gpu", *files)] if files else [])
    assert [row["status"] for row in rows_of(tmp_path)] == ([] if files else ["missing"])


@pytest.mark.slow
def test_every_test_for_a_gpu_is_in_a_selected_file():
    """Of all files, collected as if there were a GPU."""
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: True; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    command += ["--continue-on-collection-errors"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in result.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    assert len(tests) > 400
    assert {test.partition("::")[0] for test in tests} <= set(stage.gpu_test_files())
    assert any("test_grouped_attention_triton" in test for test in tests)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    recorder = make_recorder(tmp_path)
    stage.run(recorder)
    (summary,) = rows_of(tmp_path)
    assert summary["passed"] > 30
    assert not recorder.found_wrong
