"""The picture of speed: its numbers are those of the tables, and losses are shown."""

import csv
import json

import pytest

from harness.places import RESULTS
from paper import speed

GPU = RESULTS / "gpu"


def measured(path, case, contender):
    with (RESULTS / path).open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if (row["case"], row["contender"]) == (case, contender)]
    return float(row["ratio"])


def test_bars_of_the_cpu_are_the_ratios_of_the_rows():
    bars = {(bar.work, bar.against): bar.times for bar in speed.cpu_bars(RESULTS)}
    assert bars["assignment, 20 objects", "scipy"] == measured("linear_assignment.csv", "132x300x20", "scipy")
    assert bars["training step, 1 group", "transformers"] == measured("training_step.csv", "K1xN300", "transformers")


def test_a_bar_of_the_gpu_is_the_ratio_of_two_times():
    """The criterion of transformers over this package's, read from the rows by themselves."""
    bars = {(bar.work, bar.against): bar.times for bar in speed.gpu_bars(GPU)}
    rows = [json.loads(line) for line in (GPU / "ops.jsonl").read_text().splitlines()]
    ratios = []
    for run in {row["run"] for row in rows}:
        own = [r for r in rows if r["run"] == run and r.get("work") == "criterion" and r.get("case") == "132x300x20"]
        wall = {r["contender"]: r["wall"] for r in own if r.get("status") == "ok" and r.get("wall")}
        if len(wall) > 1:
            ratios.append(wall["transformers"] / wall["groupdetr_fast"])
    assert any(bars["matching and losses, 20 objects", "transformers"] == pytest.approx(ratio) for ratio in ratios)


def test_picture_of_what_is_there(tmp_path, capsys):
    picture = tmp_path / "speed.png"
    speed.main(["--gpu-results", str(tmp_path), "--write", str(picture)])
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "two CPU cores" in printed
    assert "FlexAttention" not in printed


def test_without_rows_it_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--results", str(tmp_path), "--gpu-results", str(tmp_path)])
    assert "nothing was measured: run make bench" in capsys.readouterr().err
