"""The stage of the GPU report that tries tiles, and what it reads in the words of NVIDIA's tools."""

import json
import math
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from gpu import every_op, tools, tune
from gpu.launches import ATTENTION, OTHERS, Problem, default_tile, tiles, with_tile
from gpu.recorder import Recorder

CPU = torch.device("cpu")
KERNELS = (*ATTENTION, *OTHERS)


def make_recorder(folder, minutes=1.0):
    return Recorder(folder, "tune", device=CPU, minutes=minutes, rehearsal=True, commit="none")


def rows_of(folder, kind):
    rows = map(json.loads, (folder / "tune.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


class InstantCompilers:
    """Compiles nothing; some submissions end as if a process had crashed."""

    def __init__(self, crashes=()):
        self.submitted = self.closed = 0
        self.crashes = crashes

    def submit(self, *_):
        future = Future()
        if self.submitted in self.crashes:
            future.set_exception(BrokenProcessPool("crashed"))
        else:
            future.set_result(None)
        self.submitted += 1
        return future

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_begin_with_the_launchers_own(kernel):
    problem = Problem(kernel)
    found = tiles(problem)
    assert found[0] == default_tile(problem)
    assert len({tuple(tile.items()) for tile in found}) == len(found) > 10
    for tile in found[1:]:
        with with_tile(problem, tile):
            assert default_tile(problem) == tile
    assert default_tile(problem) == found[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton would keep the kernels for its other target")
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_into_the_cache_without_a_launch(kernel, tmp_path, monkeypatch):
    """With a driver that knows its target and nothing more; a launch would fail."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Driver())
    problem = Problem(kernel, batch=1, layers=1)
    for _ in range(2):
        tune.compile_(problem, tiles(problem)[1], CPU)
        assert len(list(tmp_path.rglob("*.cubin"))) == 1


def test_sweep_ranks_tiles_and_names_what_fails(tmp_path, monkeypatch):
    def measure(self, problem, tile):
        if tile["warps"] == 8:
            raise KeyError("of Triton")  # which recorder.row does not know
        return {"over_default": tile["block"] / problem.batch}

    monkeypatch.setattr(tune.Sweep, "_measure", measure)
    compilers = InstantCompilers(crashes=(2,))
    sweep = tune.Sweep(make_recorder(tmp_path), compilers)
    problems = Problem("attention_forward"), Problem("attention_forward", batch=16)
    chosen = tiles(problems[0])
    sweep([(problems, tile) for tile in chosen])
    rows = rows_of(tmp_path, "tile")
    assert len(rows) == 2 * len(chosen)
    assert compilers.closed == 1
    for row in rows:
        assert row["status"] == ("missing" if row["warps"] == 8 else "ok")
        assert row["status"] == "ok" or row["note"] == "RuntimeError: KeyError: 'of Triton'"
    assert {tile["block"] for tile in sweep.best(3, *problems)} == {32}
    assert len(sweep.best(3, *problems)) == 3
    sweep.add_best()
    (small, large) = rows_of(tmp_path, "best_tile")
    assert (small["block"], small["over_default"], large["over_default"]) == (32, 16, 2)
    assert (small["batch"], large["batch"]) == (2, 16)


def test_an_unforeseen_error_becomes_a_row(tmp_path):
    with tune._recorded(make_recorder(tmp_path), "profiler"):
        raise OSError("not executable")
    (row,) = rows_of(tmp_path, "profiler")
    assert (row["status"], row["note"]) == ("missing", "OSError: not executable")


def test_sweep_ends_in_time_and_after_two_crashes(tmp_path):
    jobs = [([Problem("matching_cost")], tile) for tile in tiles(Problem("matching_cost"))]
    sweep = tune.Sweep(make_recorder(tmp_path, minutes=0), InstantCompilers())
    sweep(jobs)
    assert sweep.best(2, Problem("matching_cost")) == []
    sweep.add_best()
    tune.Sweep(make_recorder(tmp_path), InstantCompilers(crashes=range(100)))(jobs)
    notes = [row["note"] for row in rows_of(tmp_path, "tile")]
    assert notes == ["27 of 27 tiles left out: no time", "27 of 27 tiles left out: their compiler crashed"]


def test_results_of_a_tile_are_compared():
    expected = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
    tune._assert_alike(expected, expected)
    tune._assert_alike((expected[0], expected[1] + 0.01), expected)
    for wrong in (torch.tensor([1, 1, 1.1]), torch.tensor([1, 1, math.nan])):
        with pytest.raises(AssertionError, match="differs from the launcher's own tile"):
            tune._assert_alike((expected[0], wrong), expected)
    with pytest.raises(AssertionError, match="another dropout mask"):
        tune._assert_alike((torch.tensor([1]),), (torch.tensor([2]),))


def test_attention_of_any_size_is_compiled_once():
    small = Problem("attention_forward", batch=16, dropout=0.1)
    assert replace(small, queries=900).compiled_as() == replace(small, batch=2)
    assert Problem("matching_cost", queries=900).compiled_as().queries == 900


def test_every_op_runs():
    every_op.small(CPU)


def test_a_program_is_ended_after_its_time():
    start = time.monotonic()
    text, status = tools.Program(
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    ).finish(2)
    assert (text, status) == ("begun\n", None)
    assert tools.reason(text, status) == "not done in time: begun"
    assert time.monotonic() - start < 30
    assert tools.Program([sys.executable, "-c", "raise SystemExit(3)"]).finish(20) == ("", 3)


def test_what_the_sanitizer_says():
    good = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert tune._verdict(good, 0) == {"summary": "0 errors"}
    bad = (
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
        "=========     at kernel+0x100\n========= ERROR SUMMARY: 2 errors\n"
    )
    verdict = tune._verdict(bad, 0)
    assert (verdict["status"], verdict["summary"]) == ("wrong", "2 errors")
    assert "Invalid __global__ read of size 4 bytes at kernel+0x100" in verdict["note"]
    assert tools.summary("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")[1] == 0
    assert tools.summary("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)")[1] == 2
    verdict = tune._verdict("Traceback\nImportError: no package\n", 1)
    assert (verdict["status"], verdict["note"]) == ("missing", "status 1: ImportError: no package")
    assert tune._verdict(good, 1)["status"] == "wrong"


def test_what_the_profiler_says():
    header = '"ID","Process ID","Process Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        "==PROF== Connected to process 7",
        header,
        '"0","7","python3","_fwd_kernel","Command line","gpu__time_duration.sum","ns","12,345"',
        '"0","7","python3","_fwd_kernel","Command line","launch__registers_per_thread","register/thread","64"',
        '"1","7","python","void ns::(anonymous namespace)::deform<float, 4>(P, int)","Command","a_new_metric","","n/a"',
        "==PROF== Disconnected",
    ]
    assert tools.profiles("\n".join(lines)) == [
        {"kernel": "_fwd_kernel", "nanoseconds": 12345.0, "registers": 64.0},
        {"kernel": "ns::deform", "a_new_metric": "n/a"},
    ]
    error = "==PROF== x\n==ERROR== ERR_NVGPUCTRPERM - no permission\n"
    assert tools.profiles(error) == []
    assert tools.reason(error, 9) == "status 9: ==ERROR== ERR_NVGPUCTRPERM - no permission"


@pytest.mark.slow
def test_rehearsal(tmp_path):
    recorder = make_recorder(tmp_path, minutes=5)
    tune.run(recorder)
    assert not recorder.found_wrong
    rows = rows_of(tmp_path, "tile")
    assert {row["kernel"] for row in rows} == set(KERNELS)
    assert all(row["status"] == "ok" and row["microseconds"] > 0 for row in rows)
    assert [row["status"] for row in rows_of(tmp_path, "every_op")] == ["ok"]
    assert {row["tool"] for row in rows_of(tmp_path, "sanitizer")} == {"memcheck", "racecheck"}
    assert len(rows_of(tmp_path, "profiler")) == 1
