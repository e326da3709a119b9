"""Trainings on two CPU processes, with gloo, are those of one process with batches of twice the size."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from one_of_two_processes import config_of
from PIL import Image
from safetensors.torch import load_file
from small_runs import write_images
from test_passes import MASKS, MODELS, small_batch, small_model

import groupdetr_fast as gd
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.checkpoint import latest_checkpoint

SCRIPT = Path(__file__).with_name("one_of_two_processes.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def run_on_two(folder, output, kind, **optimization):
    return launch([*TORCHRUN, SCRIPT, folder, output, kind, json.dumps(optimization)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images to train on, two of which are damaged.

    Seven are to evaluate on: one of two processes has a batch less.
    """
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    for name in ("08.png", "10.png"):
        (folder / "images" / name).write_bytes(b"no image")
    content = json.loads((folder / "instances.json").read_text())
    content["images"] = content["images"][:7]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    (folder / "seven.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The folder of a run of 15 optimiser steps on one process, two images each."""
    output = folder / "one"
    train(config_of(folder, output, batch_size=2))
    return output


def results(output):
    return json.loads((output / "results.json").read_text())


def weights(output, name="model.safetensors"):
    return load_file(output / "checkpoints" / "epoch_0003" / name)


def assert_same_training(found, expected):
    for row, other in zip(results(found)["epochs"], results(expected)["epochs"], strict=True):
        assert row["train"] == pytest.approx(other["train"], rel=1e-5)
        assert row["metrics"]["AP"] == pytest.approx(other["metrics"]["AP"], abs=1e-6)
        assert row["unreadable_images"] == other["unreadable_images"] == 2
    # Adam divides a gradient by its size: where it is all rounding, a weight moves by a part of the rate of 1e-3.
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=1e-4)


def test_two_processes_train_and_evaluate_as_one(folder, one_process):
    done = run_on_two(folder, folder / "two", "with its page", batch_size=1)
    assert done.returncode == 0, done.stderr
    assert_same_training(folder / "two", one_process)
    detections = json.loads((folder / "two" / "detections.json").read_text())
    images = [detection["image_id"] for detection in detections]
    expected = json.loads((one_process / "detections.json").read_text())
    assert images == [detection["image_id"] for detection in expected]  # each image once
    assert sorted(set(images)) == [1, 2, 3, 4, 5, 6, 7]
    assert [d["score"] for d in detections] == pytest.approx([d["score"] for d in expected], abs=1e-4)
    metrics = dict(re.findall(r"metrics of process (\d): (.*)", done.stderr))
    assert metrics["0"] == metrics["1"] == json.dumps([row["metrics"] for row in results(folder / "two")["epochs"]])
    assert (folder / "two" / "index.html").is_file()
    assert len(list((folder / "two" / "tensorboard").glob("**/events*"))) == 1
    pictures = [Image.open(output / "predictions.png") for output in (folder / "two", one_process)]
    assert pictures[0].size == pictures[1].size  # every image, and not those of one process
    assert done.stderr.count("the backbone resnet18 starts from random weights") == 1  # said by one of them
    assert done.stderr.count("left out the") >= 2  # said by whoever met it
    assert len(re.findall(r"^/.*Warning: ", done.stderr, re.MULTILINE)) <= 1, done.stderr
    # A thread of gloo that still works when the interpreter ends aborts the process.
    assert "pt_gloo" not in done.stderr, done.stderr


@pytest.mark.slow
def test_all_skip_a_step_that_is_broken_in_one_of_them_and_one_says_so(folder, tmp_path):
    done = run_on_two(folder, tmp_path / "run", "spoiled", batch_size=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the loss is not finite: step skipped; image ids [4]") == 3  # one in each epoch
    assert done.stderr.count("step skipped") == 3
    assert [row["skipped_steps"] for row in results(tmp_path / "run")["epochs"]] == [1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "sentence"),
    [
        ("worker killed", "error: a process that loads images died"),
        ("process 0 killed", "error: another process of this command has ended"),
        ("process 1 killed", "error: another process of this command has ended"),
    ],
)
def test_what_is_killed_ends_the_training_in_a_sentence(folder, tmp_path, killed, sentence):
    done = run_on_two(folder, tmp_path / "run", killed, batch_size=1)
    assert done.returncode != 0
    assert done.stderr.count(sentence) == 1, done.stderr
    assert "[rank" not in done.stderr  # which begins the lines of tracebacks, but for the launcher's
    if killed.startswith("process"):
        assert latest_checkpoint(tmp_path / "run").name == "epoch_0001"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"groups_per_pass": 1}, id="groups in passes"),
        pytest.param({"accumulate": 2}, id="accumulation"),
        pytest.param({"ema_decay": 0.9, "recompute_layers": True}, id="average"),
    ],
)
def test_with_options_too(folder, tmp_path, options):
    one, two = tmp_path / "one", tmp_path / "two"
    train(config_of(folder, one, batch_size=2, **options))
    done = run_on_two(folder, two, "plain", batch_size=1, **options)
    assert done.returncode == 0, done.stderr
    assert_same_training(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "accumulate": 2, "recompute_layers": True}])
def test_sharded_weights_train_as_whole_ones(folder, tmp_path, options):
    """FSDP; its checkpoints are resumed by FSDP and by a single process."""
    one, sharded = tmp_path / "one", tmp_path / "sharded"
    train(config_of(folder, one, batch_size=2, **options))
    done = run_on_two(folder, sharded, "sharded, stopped", batch_size=1, **options)
    assert done.stderr.count("stopped as asked") == 1, done.stderr
    alone = tmp_path / "alone"
    subprocess.run(["cp", "-r", sharded, alone], check=True)
    done = run_on_two(folder, sharded, "sharded, resumed", batch_size=1, **options)
    assert done.returncode == 0, done.stderr
    assert_same_training(sharded, one)
    train(replace(config_of(folder, alone, batch_size=2, **options), resume=True))
    assert_same_training(alone, one)


@pytest.mark.slow
def test_stopping_one_process_stops_both_and_resuming_is_exact(folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = run_on_two(folder, whole, "plain", batch_size=1)
    assert done.returncode == 0, done.stderr
    done = run_on_two(folder, stopped, "stopped", batch_size=1)
    assert done.stderr.count("stopped as asked, in epoch 2; a checkpoint is written") == 1, done.stderr
    assert (stopped / "checkpoints" / "epoch_0001_batch_000003").is_dir()
    done = run_on_two(folder, stopped, "resumed", batch_size=1)
    assert done.returncode == 0, done.stderr
    first, second = weights(whole), weights(stopped)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for row, other in zip(results(whole)["epochs"], results(stopped)["epochs"], strict=True):
        assert row["train"] == pytest.approx(other["train"], rel=1e-6)


@pytest.mark.slow
def test_all_write_a_checkpoint_when_it_is_time_for_one_of_them(folder, tmp_path):
    """What a process says in a step is known to all when the next one is on its way."""
    done = run_on_two(folder, tmp_path / "run", "hurried", batch_size=1, epochs=2)
    assert done.returncode == 0, done.stderr
    for process in range(2):
        saved = re.findall(rf"process {process} saved at \((\d), (\d)\)", done.stderr)
        assert saved == [("0", "2"), ("0", "4"), ("1", "0"), ("1", "2"), ("1", "4"), ("2", "0")]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_with_twice_the_steps(folder, tmp_path, monkeypatch):
    done = run_on_two(folder, tmp_path, "plain", batch_size=1, epochs=1)
    assert done.returncode == 0, done.stderr
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (rates.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    train(replace(config_of(folder, tmp_path, batch_size=1), resume=True))
    assert rates == pytest.approx([1e-3] * 10 + [1e-4] * 10)  # drops after epoch 2, at steps 5 + 10


def processes_below(pid):
    """Ids of a process and of all that it has started, directly or not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in processes_below(int(child)))]


@pytest.mark.parametrize(
    ("to", "place", "calls", "where"),
    [
        pytest.param("launcher", "AdamW.step", 2, "in epoch 1", id="launcher"),
        pytest.param("all", "AdamW.step", 2, "in epoch 1", id="every process", marks=pytest.mark.slow),
        # two processes, two calls each before the first step
        pytest.param(
            "launcher",
            "CollectedDetections.add",
            5,
            "in the evaluation of epoch 1",
            id="evaluation",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sigterm_to_a_launcher_leaves_a_checkpoint(folder, tmp_path, to, place, calls, where):
    """The launcher sends it to the process groups of its processes, workers included; a scheduler sends it to all."""
    arguments = [folder, tmp_path / "run", f"announced {place}", json.dumps({"batch_size": 1})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*TORCHRUN, SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as launcher:
        seen = 0
        while seen < calls and (line := launcher.stdout.readline()):
            seen += line.count(place)
        for pid in [launcher.pid] if to == "launcher" else reversed(processes_below(launcher.pid)):
            os.kill(pid, signal.SIGTERM)
        _, log = launcher.communicate(timeout=120)
    assert log.count(f"stopped as asked, {where}; a checkpoint is written") == 1, log
    assert "a process that loads images died" not in log
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint.name == "epoch_0001" if "evaluation" in where else checkpoint.name.startswith("epoch_0000_batch_")


LAUNCHERS = {
    "torchrun": TORCHRUN,
    # With --cpu, accelerate starts one process; this is how it starts several, whatever they run on.
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes=2", "--mixed_precision=bf16"),
    ],
}
SMALL = """--model conditional_detr_r50 --num-groups 2 --num-queries 4 --d-model 16 --num-heads 2 --encoder-layers 1
    --decoder-layers 2 --dim-feedforward 16 --backbone conv:8-16 --short-sides 32 --eval-short-side 32 --crop 0
    --epochs 1 --batch-size 2 --workers 0 --pictures 2"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_runs_under_launchers(folder, tmp_path, launcher):
    images = folder / "images"
    paths = ["--train-images", images, "--val-images", images, "--output", tmp_path]
    paths += ["--train-annotations", folder / "instances.json", "--val-annotations", folder / "seven.json"]
    module = ["-m", "groupdetr_fast", "train", *SMALL.split()]
    done = launch([*LAUNCHERS[launcher], *module, *paths])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1  # of one training, not of two
    assert (tmp_path / "predictions.png").exists()
    assert results(tmp_path)["optimization"]["precision"] == ("bf16" if launcher == "accelerate" else "no")
    state = torch.load(tmp_path / "checkpoints" / "epoch_0001" / "state.pt", weights_only=True)
    assert state["batches_per_epoch"] == 3  # five batches
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])  # each draws its own dropout


def steps_where_one_process_has_no_objects(rank, folder, errors):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for name, overrides in [*(model.values for model in MODELS), ("mask2former_r50", MASKS)]:
            model = small_model(name, **overrides)
            criterion = gd.build_criterion(model)
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            for seed in range(2):  # the second forward pass finds out what the first backward pass lacked
                batch = small_batch(*((2, 1) if rank == 0 else (0, 0)), seed=seed, masks=name.startswith("mask"))
                criterion(wrapped(batch.images, batch.masks, batch.targets), batch.targets)["loss"].backward()
        errors.put(None)
    except Exception as error:
        errors.put(f"{name}: {error}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_detector_goes_on_where_one_process_has_no_objects(tmp_path):
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    arguments = [(rank, tmp_path, errors) for rank in range(2)]
    processes = [context.Process(target=steps_where_one_process_has_no_objects, args=args) for args in arguments]
    for process in processes:
        process.start()
    found = [errors.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    assert found == [None, None]


def test_processes_agree_on_the_size_of_a_batch(folder, tmp_path):
    """One has memory for seven images, the other for three."""
    first, second = tmp_path / "auto", tmp_path / "two"
    result = run_on_two(folder, first, "memory of its own", batch_size="auto", images_per_step=8, epochs=1)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("batch_size auto: 2 images, the largest that fits; accumulate 2") == 1
    result = run_on_two(folder, second, "plain", batch_size=2, accumulate=2, epochs=1)
    assert result.returncode == 0, result.stderr
    expected, found = (load_file(run / "checkpoints" / "epoch_0001" / "model.safetensors") for run in (second, first))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
