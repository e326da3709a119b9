"""``groupdetr analyze``, with runs whose results are made up, and once for real."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from groupdetr_fast import cli
from groupdetr_fast.analysis import cost
from groupdetr_fast.analysis.run import RunResults
from groupdetr_fast.commands import analyze
from groupdetr_fast.data import DigitsConfig, digits_dataset
from groupdetr_fast.runs import demo
from groupdetr_fast.runs.config import ModelConfig
from groupdetr_fast.runs.demo import digits_demo
from groupdetr_fast.training.config import OptimizationConfig

METRICS = {"AP": 0.25, "AP50": 0.5, "AP75": 0.125}
FILES = ("train_images", "train_annotations", "val_images", "val_annotations")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=8, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)


@pytest.fixture
def flags(digits, tmp_path):
    """Flags of a tiny training on the digits."""
    sizes = "--num-groups 2 --num-queries 5 --d-model 32 --num-heads 2 --encoder-layers 1 --decoder-layers 1"
    sizes += " --dim-feedforward 32 --backbone conv:8-16 --epochs 2 --lr 1e-2 --batch-size 4 --workers 0"
    images = "--short-sides 48 --eval-short-side 48 --crop 0 --flip 0 --max-size None --eval-max-size None"
    data = [f"--{name.replace('_', '-')}={path}" for name, path in zip(FILES, digits, strict=True)]
    return [*data, *sizes.split(), *images.split(), "--output", str(tmp_path / "analysis")]


def test_a_detector_that_there_is_not_is_refused_before_any_run(flags, tmp_path):
    with pytest.raises(SystemExit, match="error: unknown model 'nonsense'"):
        cli.main(["analyze", "sweep-groups", *flags, "--model", "nonsense"])
    assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sweep-groups --model nonsense", "unknown model 'nonsense'"),
        ("cost --model nonsense", "unknown model 'nonsense'"),
        ("agreement --model nonsense", "unknown model 'nonsense'"),
        ("cost --batch-size auto", "batch_size auto is found when a training begins: give a number here"),
        ("agreement --batch-size auto", "batch_size auto is found when a training begins: give a number here"),
        ("sweep-groups --jobs 0", "jobs must be positive, got 0"),
        ("ablation --gpu-memory-gib nan", "gpu_memory_gib must be positive, got nan"),
        ("sweep-groups --baseline-epochs 12 0", "baseline_epochs must be numbers from 1 on, got 12, 0"),
        ("agreement --num-groups 0", "num_groups must be at least 1, got 0"),
        ("distances --top-k 0", "top_k must be at least 1"),
        ("group-ap --checkpoint nowhere.pth", "there is nothing at nowhere.pth"),
    ],
)
def test_what_cannot_be_is_refused_before_digits_are_composed(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "digits_dataset", lambda **_: pytest.fail("digits are composed"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        cli.main(["analyze", *arguments.split(), "--output", str(tmp_path / "analysis")])
    assert not (tmp_path / "analysis").exists()


def test_what_the_process_of_a_measurement_says_has_one_beginning(tmp_path, monkeypatch):
    said = subprocess.CompletedProcess([], 1, stderr="WARNING a: b\nerror: the data have a fault\n")
    monkeypatch.setattr(cost.subprocess, "run", lambda *arguments, **options: said)
    with pytest.raises(SystemExit, match=r"^error: the data have a fault$"):
        cli.main(["analyze", "cost", "--coco-path", "c", "--groups", "1", "--output", str(tmp_path)])


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Instead of being trained, runs get results, and a checkpoint of random weights. A list of those asked for."""
    asked = []

    def run_sweep(runs, folder, **limits):
        results = {}
        for run in runs:
            asked.append(run)
            config = run.training.model
            checkpoint = folder / run.name / "epoch_0002"
            checkpoint.mkdir(parents=True, exist_ok=True)
            model = config.build(10)
            metadata = {"model": config.model, "model_config": vars(model.config), "labels": "contiguous"}
            metadata["evaluation"] = {"eval_short_side": 48, "eval_max_size": None}
            save_file(model.state_dict(), checkpoint / "model.safetensors", {"groupdetr_fast": json.dumps(metadata)})
            epochs = [
                {"epoch": epoch, "seconds": 60.0, "peak_memory_mib": 100.0, "metrics": METRICS}
                for epoch in range(1, run.epochs + 1)
            ]
            usages = dict.fromkeys(("one_group", "one_group_nms", "all_queries", "all_queries_nms"), METRICS)
            steps = (1, 20) if config.num_groups > 1 else ()
            distances = [{"step": step, "perturbation_distance": 0.1, "matching_distance": 0.4} for step in steps]
            results[run.name] = RunResults(epochs, usages, distances, checkpoint)
        return results

    monkeypatch.setattr("groupdetr_fast.commands.analyze.common.run_sweep", run_sweep)
    return asked


def rows_of(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arguments", "name", "runs", "rows"),
    [
        (["sweep-groups", "--groups", "1", "2", "--baseline-epochs", "3"], "sweep_groups", 6, 6),
        (["assignment", "--groups", "1", "2"], "assignment", 12, 12),
        (["ablation"], "ablation", 10, 10),
        (["distances"], "distances", 2, 4),  # rows: two steps of each run
        (["group-ap"], "group_ap", 2, 4),  # two groups of each run
        (["reference-points"], "reference_points", 1, 10),  # two groups of five queries
    ],
)
def test_every_measurement_leaves_its_files(arguments, name, runs, rows, flags, made_up, tmp_path, capsys):
    command = ["analyze", *arguments, *flags, "--seeds", "2", "--seed", "4"]
    cli.main(command)
    folder = tmp_path / "analysis"
    assert len(made_up) == runs
    assert {run.training.optimization.seed for run in made_up} == ({4, 5} if runs > 1 else {4})
    assert len(rows_of(folder, name)) == rows
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["command"].startswith(f"groupdetr analyze {arguments[0]}")
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert f'src="{name}.png"' in (folder / "index.html").read_text()
    assert content["title"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "seeds", "words"),
    [
        ("distances", "1", "; seed 4."),
        *((command, "2", "; seeds 4, 5; mean and sample") for command in ("distances", "assignment", "ablation")),
        ("sweep-groups", "2", "2 runs at a time on 1 thread each; seeds 4, 5; mean and sample"),
        ("group-ap", "1", " 1 trained model: seed 4."),
        ("group-ap", "2", " 2 trained models: seed 4, seed 5."),
    ],
)
def test_captions_name_the_seeds_and_a_spread_where_there_is_one(command, seeds, words, flags, made_up, tmp_path):
    cli.main(["analyze", command, *flags, "--seeds", seeds, "--seed", "4"])
    name = command.replace("-", "_")
    assert words in json.loads((tmp_path / "analysis" / f"{name}.json").read_text())["caption"]


def test_the_table_of_the_sweep(flags, made_up, tmp_path):
    cli.main(["analyze", "sweep-groups", "--groups", "1", "2", *flags, "--seeds", "2"])
    summary = json.loads((tmp_path / "analysis" / "sweep_groups.json").read_text())["summary"]
    assert [(row["num_groups"], row["epochs"], row["runs"]) for row in summary] == [(1, 2, 2), (2, 2, 2)]
    assert summary[0]["AP_one_group"] == 0.25
    assert summary[0]["AP_one_group_std"] == 0
    assert summary[0]["minutes"] == 2.0


def test_a_given_checkpoint_needs_no_run(flags, made_up, tmp_path):
    """Of the reference points: nor does it need flags, since the checkpoint says what it is of."""
    cli.main(["analyze", "reference-points", *flags])
    checkpoint = next((tmp_path / "analysis").glob("runs/*/epoch_0002"))
    expected = (tmp_path / "analysis" / "reference_points.csv").read_text()
    made_up.clear()
    output = tmp_path / "again"
    cli.main(["analyze", "reference-points", "--checkpoint", str(checkpoint), "--output", str(output)])
    assert (output / "reference_points.csv").read_text() == expected
    for name in ("--checkpoint", "--load"):
        cli.main(["analyze", "group-ap", name, str(checkpoint), *flags, "--output", str(output)])
    assert [row["group"] for row in rows_of(output, "group_ap")] == ["0", "1"]
    assert made_up == []
    with pytest.raises(SystemExit, match="give --checkpoint or --load, not both"):
        cli.main(["analyze", "group-ap", "--checkpoint", str(checkpoint), "--load", str(checkpoint), *flags])


def test_a_checkpoint_is_evaluated_as_its_training_did(flags, monkeypatch, tmp_path):
    model = ModelConfig(num_groups=2, num_queries=5, d_model=16, num_heads=2, backbone="conv:8").build(10)
    evaluation = {"eval_short_side": 40, "eval_max_size": 50, "image_mean": (0.5, 0.4, 0.3)}
    metadata = {"model": "conditional_detr_r50", "model_config": vars(model.config), "labels": "category_id"}
    text = json.dumps({**metadata, "evaluation": evaluation})
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"groupdetr_fast": text})
    seen = []
    evaluated = "groupdetr_fast.commands.analyze.group_ap.evaluate_groups"
    monkeypatch.setattr(evaluated, lambda config, _: seen.append(config) or [METRICS] * 2)
    cli.main(["analyze", "group-ap", "--checkpoint", str(tmp_path / "model.safetensors"), *flags])
    assert {name: getattr(seen[0].augmentation, name) for name in evaluation} == evaluation
    assert seen[0].data.labels == "category_id"
    assert seen[0].model.num_queries == 5


def test_a_checkpoint_that_says_nothing_is_refused(flags, tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match="does not say which detector it is of"):
        cli.main(["analyze", "group-ap", "--checkpoint", str(tmp_path / "model.safetensors"), *flags])


def test_without_data_the_defaults_are_those_of_the_demo(monkeypatch):
    seen = []
    monkeypatch.setattr(analyze.AblationCommand, "__call__", lambda command: seen.append(command))
    cli.main(["analyze", "ablation"])
    cli.main(["analyze", "ablation", "--coco-path", "coco"])
    cli.main(["analyze", "ablation", "--data-path", "photos"])
    demo, own, photos = seen
    assert (photos.data.data_path, photos.data.workers, photos.augmentation.flip) == (Path("photos"), None, 0.5)
    assert (photos.model, photos.optimization) == (demo.model, demo.optimization)
    assert photos.augmentation.short_sides == demo.augmentation.short_sides
    assert demo.model == digits_demo(compose=False).model
    assert demo.optimization.epochs == analyze.DEMO_EPOCHS
    assert [each.checkpoint_minutes for each in seen] == [1.0] * 3
    assert (own.data.coco_path, own.model.num_groups, own.optimization.lr) == (Path("coco"), 11, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "error: there is no measurement in"),
        (["distances", "--num-groups", "1"], "error: distances need at least 2 groups"),
    ],
)
def test_faults_are_one_sentence(arguments, message, flags, made_up, tmp_path):
    own = ["--output", str(tmp_path / "analysis")] if arguments == ["report"] else flags
    with pytest.raises(SystemExit, match=message):
        cli.main(["analyze", *arguments[:1], *own, *arguments[1:]])


def test_thresholds_that_no_overlap_has_are_refused():
    for value in (2, float("nan")):
        with pytest.raises(ValueError, match=r"nms_threshold must be in \[0, 1\], got"):
            analyze.GroupApCommand(nms_threshold=value)


def test_no_seed_is_refused():
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        analyze.AblationCommand(seeds=0)


def test_the_agreement_of_groups_is_measured_while_they_train(flags, tmp_path, capsys):
    cli.main(["analyze", "agreement", "--steps", "3", "--every", "2", "--batches", "1", *flags])
    rows = rows_of(tmp_path / "analysis", "agreement")
    assert [int(row["step"]) for row in rows] == [0, 2, 3]
    assert all(-1 <= float(row["decoder"]) <= 1 for row in rows)
    assert len({row["decoder"] for row in rows}) == 3  # it trains
    assert "step 2: cosine" in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        analyze.AgreementCommand(steps=-1)
    with pytest.raises(SystemExit, match="the agreement of groups needs at least 2 groups, got 1"):
        cli.main(["analyze", "agreement", *flags, "--num-groups", "1"])


def test_the_spread_of_queries_is_measured_while_they_train(flags, tmp_path, capsys):
    cli.main(["analyze", "spread", "--steps", "3", "--every", "2", "--batches", "1", *flags])
    rows = rows_of(tmp_path / "analysis", "spread")
    assert [int(row["step"]) for row in rows] == [0, 2, 3]
    assert len({row["content_first"] for row in rows}) == 3  # it trains
    assert "step 0: loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="compile hides the decoder layers, whose contents are measured: leave it out"):
        analyze.SpreadCommand(optimization=OptimizationConfig(compile=True))


def test_measuring_over_steps_leaves_the_training_as_it_is(flags, tmp_path):
    """The same losses at the end, whether measured in between or not."""
    losses = []
    for every in ("1", "3"):
        output = ["--output", str(tmp_path / every)]
        cli.main(["analyze", "spread", "--steps", "3", "--every", every, "--batches", "1", *flags, *output])
        losses.append(rows_of(tmp_path / every, "spread")[-1])
    assert losses[0] == losses[1]


def test_the_agreement_of_a_trained_model_is_measured_without_training(flags, tmp_path):
    cli.main(["analyze", "agreement", "--steps", "0", "--batches", "1", *flags])
    (row,) = rows_of(tmp_path / "analysis", "agreement")
    assert row["step"] == "0"


@pytest.mark.slow
def test_time_and_memory(flags, tmp_path):
    """A process of its own for each number of groups."""
    cli.main(["analyze", "cost", "--groups", "2", "--steps", "3", "--warmup", "1", *flags])
    (row,) = rows_of(tmp_path / "analysis", "cost")
    assert row["num_groups"] == "2"
    median, low, high = (float(row[f"seconds_per_step{suffix}"]) for suffix in ("", "_p20", "_p80"))
    assert 0 < low <= median <= high
    assert float(row["seconds_per_epoch"]) == pytest.approx(2 * median)  # 8 images, batches of 4
    assert float(row["peak_memory_mib"]) > 50


@pytest.mark.slow
def test_a_real_sweep_and_what_builds_on_it(flags, tmp_path):
    """Two processes at a time; the second measurement finds one of its runs made by the first."""
    once = ["--seeds", "1", "--jobs", "2"]
    cli.main(["analyze", "sweep-groups", "--groups", "1", "2", *flags, *once])
    folder = tmp_path / "analysis"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/measured.json")}
    assert len(times) == 2
    cli.main(["analyze", "ablation", *flags, *once])
    assert len(list(folder.glob("runs/*/measured.json"))) == 5
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    page = (folder / "index.html").read_text()
    assert page.index("sweep_groups.png") < page.index("ablation.png")
