"""Trainings that are killed or stopped go on to the weights of a run that was not; other faults end in one sentence."""

import json
import os
import random
import signal
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from small_runs import (
    final_weights,
    kill_before,
    kill_before_it_takes_its_place,
    kill_halfway,
    kill_some_time_after_the_first_step,
    kill_worker_at,
    run_process,
    same_weights,
    signal_group_before,
    small_config,
    spoil_images,
    stop_and_kill_workers_before,
    terminate_before,
    write_images,
)

from groupdetr_fast.training import faults
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.faults import EXIT_STOPPED, StopRequest, TrainingError, TrainingStopped


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Weights of a run that nothing stops and that writes no checkpoint within an epoch."""
    config = small_config(data, tmp_path_factory.mktemp("undisturbed") / "run")
    status, log = run_process(config)
    assert status == 0, log
    return final_weights(config)


@pytest.fixture
def config(data, tmp_path):
    """5 steps in each of 3 epochs, and a checkpoint after steps 2, 4, 5, 7, 9, 10, 12, 14 and 15."""
    return replace(small_config(data, tmp_path / "run"), checkpoint_every=2)


def finish(config, undisturbed, start=None):
    """Resume, from the checkpoint ``start`` if it is given, and compare the weights. Returns what was printed."""
    status, log = run_process(replace(config, resume=True))
    assert status == 0, log
    assert start is None or f"resumed {config.output}/checkpoints/{start}\n" in log, log
    assert same_weights(config, undisturbed)
    rows = json.loads((config.output / "results.json").read_text())["epochs"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert ["metrics" in row for row in rows] == [False, True, True]
    return log


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kill", "place", "number", "start"),
    [
        # in a step
        pytest.param(kill_before, "AdamW.step", 8, "epoch_0001_batch_000002", id="step 8"),
        pytest.param(kill_before, "AdamW.step", 6, "epoch_0001", id="step 6", marks=SLOW),
        pytest.param(kill_before, "Tensor.backward", 15, "epoch_0002_batch_000004", id="backward 15", marks=SLOW),
        # in an evaluation
        pytest.param(kill_before, "CocoEvaluator.summarize", 2, "epoch_0002", id="evaluation", marks=SLOW),
        # while its metrics are added to the checkpoint
        pytest.param(kill_halfway, "checkpoint.save_file", 7, "epoch_0002", id="weights with metrics", marks=SLOW),
        pytest.param(kill_halfway, "torch.save", 7, "epoch_0002", id="state with metrics", marks=SLOW),
        # while a checkpoint is written
        pytest.param(kill_halfway, "checkpoint.save_file", 3, "epoch_0000_batch_000004", id="weights"),
        pytest.param(kill_halfway, "torch.save", 4, "epoch_0001", id="state", marks=SLOW),
        pytest.param(kill_before, "os.fsync", 12, "epoch_0000_batch_000004", id="fsync", marks=SLOW),
        pytest.param(kill_before, "os.rename", 4, "epoch_0001", id="rename", marks=SLOW),
        # when it is there, and older ones are removed
        pytest.param(kill_before, "Path.unlink", 1, "epoch_0001", id="unlink", marks=SLOW),
        pytest.param(kill_before, "shutil.rmtree", 2, "epoch_0001_batch_000002", id="rmtree", marks=SLOW),
        # when results.json is written, as it is with every checkpoint
        pytest.param(kill_before_it_takes_its_place, "results.json", 3, "epoch_0001", id="results", marks=SLOW),
        # when the best weights are marked
        pytest.param(kill_before, "os.link", 1, "epoch_0002", id="best", marks=SLOW),
    ],
)
def test_killed_at(config, undisturbed, kill, place, number, start):
    status, log = run_process(config, kill, place, number)
    assert status == -9, log
    finish(config, undisturbed, start)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again_at_random_moments(config, undisturbed, workers):
    config = replace(config, data=replace(config.data, workers=workers), resume=True)
    generator = random.Random(workers)
    reached, seconds = [], 0.3
    for _ in range(20):
        status, log = run_process(config, kill_some_time_after_the_first_step, generator.uniform(0, seconds))
        if status == 0:
            break
        assert status == -9, log
        reached.append(latest_checkpoint(config.output))
        if reached[-4:] == reached[-1:] * 4:  # the machine is slow
            seconds *= 2
    print(f"killed {len(reached)} times, with {len(set(reached))} different newest checkpoints")
    assert len(set(reached)) > 2
    finish(config, undisturbed)


@pytest.mark.slow
def test_killed_without_checkpoints_within_epochs(data, tmp_path, undisturbed):
    config = small_config(data, tmp_path / "run")
    status, log = run_process(config, kill_before, "AdamW.step", 9)
    assert status == -9, log
    finish(config, undisturbed, "epoch_0001")


@pytest.mark.parametrize(
    ("place", "number", "start"),
    [
        pytest.param("AdamW.step", 8, "epoch_0001_batch_000003", id="within an epoch"),
        pytest.param("AdamW.step", 5, "epoch_0000_batch_000005", id="in its last step", marks=SLOW),
        pytest.param("Trainer.finish_epoch", 1, "epoch_0001", id="between two epochs", marks=SLOW),
        pytest.param("Trainer.save", 1, "epoch_0001", id="while a checkpoint is written", marks=SLOW),
    ],
)
def test_sigterm_stops_at_the_next_step_with_a_checkpoint(data, tmp_path, undisturbed, place, number, start):
    config = small_config(data, tmp_path / "run")
    status, log = run_process(config, terminate_before, place, number)
    assert status == EXIT_STOPPED == 75, log
    assert "stopped as asked" in log
    assert "Traceback" not in log
    finish(config, undisturbed, start)


@pytest.mark.parametrize(
    ("number", "place", "call", "start", "where"),
    [
        pytest.param(signal.SIGTERM, "AdamW.step", 8, "epoch_0001_batch_000003", "in epoch 2", id="SIGTERM"),
        pytest.param(signal.SIGINT, "AdamW.step", 8, "epoch_0001_batch_000003", "in epoch 2", id="Ctrl-C"),
        pytest.param(  # the first four images are of the evaluation that is tried before the first step
            signal.SIGTERM, "CollectedDetections.add", 5, "epoch_0002", "in the evaluation of epoch 2", id="evaluation"
        ),
    ],
)
def test_a_signal_to_all_processes_stops_with_a_checkpoint(
    data, tmp_path, undisturbed, number, place, call, start, where
):
    config = small_config(replace(data, workers=2), tmp_path / "run")
    status, log = run_process(config, signal_group_before, number, place, call)
    assert status == EXIT_STOPPED, log
    assert f"stopped as asked, {where}; a checkpoint is written" in log.strip().splitlines()[-1]
    assert "Traceback" not in log
    finish(config, undisturbed, start)


def test_a_request_to_stop_comes_before_the_death_of_a_worker(data, tmp_path, undisturbed):
    config = small_config(replace(data, workers=1), tmp_path / "run")
    status, log = run_process(config, stop_and_kill_workers_before, "AdamW.step", 8)
    assert status == EXIT_STOPPED, log
    assert "stopped as asked, in epoch 2; a checkpoint is written" in log.strip().splitlines()[-1]
    finish(config, undisturbed)


def test_a_second_interrupt_does_not_wait():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """A run with two resumable checkpoints, of which the newest is ``epoch_0001_batch_000003``."""
    config = small_config(data, tmp_path_factory.mktemp("interrupted") / "run")
    status, log = run_process(config, terminate_before, "AdamW.step", 8)
    assert status == EXIT_STOPPED, log
    return config


def damaged_copy(interrupted, folder, damage):
    subprocess.run(["cp", "-r", interrupted.output, folder], check=True)
    damage(latest_checkpoint(folder))
    return replace(interrupted, output=folder)


def truncate(name, kept):
    def damage(folder):
        os.truncate(folder / name, int(kept * (folder / name).stat().st_size))

    return damage


def another_program(folder):
    torch.save({"model": {}, "args": [1, 2]}, folder / "state.pt")


def a_pickle(folder):
    torch.save(replace, folder / "state.pt")  # a function: nothing that weights alone are made of


def another_model(folder):
    save_file({"query_embed.weight": torch.zeros(3)}, folder / "model.safetensors")


def another_epoch_length(folder):
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "batches_per_epoch": 7}, folder / "state.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(truncate("state.pt", 0.5), "cannot be read", id="half a state"),
        pytest.param(truncate("state.pt", 0), "cannot be read", id="empty state", marks=SLOW),
        pytest.param(truncate("state.pt", 0.99), "cannot be read", id="most of a state", marks=SLOW),
        pytest.param(truncate("model.safetensors", 0.5), "cannot be read", id="half the weights", marks=SLOW),
        pytest.param(truncate("model.safetensors", 0.001), "cannot be read", id="few weights", marks=SLOW),
        pytest.param(another_program, "does not belong to this training: it lacks", id="another program", marks=SLOW),
        pytest.param(a_pickle, "cannot be read", id="a pickle", marks=SLOW),
        pytest.param(another_model, "does not belong to this training", id="another model", marks=SLOW),
        pytest.param(another_epoch_length, "an epoch has 5: use the same data", id="another data set", marks=SLOW),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    interrupted, undisturbed, tmp_path, damage, message
):
    config = damaged_copy(interrupted, tmp_path / "run", damage)
    log = finish(config, undisturbed, "epoch_0001")
    warning = next(line for line in log.splitlines() if "WARNING" in line and "checkpoint" in line)
    assert "epoch_0001_batch_000003" in warning
    assert message in warning
    assert "going back to the one before it" in warning


def test_a_full_disk_leaves_the_checkpoint_before(data, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    try:
        config = small_config(data, disk / "run")
        status, log = run_process(config, terminate_before, "AdamW.step", 8)
        assert status == EXIT_STOPPED, log
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(room - 32 * 1024))
        status, log = run_process(replace(config, resume=True))
        assert status == 1, log
        last = log.strip().splitlines()[-1]
        assert last.startswith(f"error: checkpoint {disk}/run/checkpoints/epoch_0002 cannot be written: "), log
        assert last.endswith(f"{disk}/run/checkpoints/epoch_0001_batch_000003 is intact and can be resumed")
        assert "Traceback" not in log
        (disk / "filler").unlink()
        finish(config, undisturbed, "epoch_0001_batch_000003")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=SLOW)])
def test_unreadable_images_are_left_out_and_counted(data, tmp_path, workers):
    images = tmp_path / "images"
    subprocess.run(["cp", "-r", data.train_images, images], check=True)
    (images / "03.png").write_bytes(b"no image")
    (images / "07.png").unlink()
    config = small_config(replace(data, train_images=images, workers=workers), tmp_path / "run")
    status, log = run_process(config)
    assert status == 0, log
    assert log.count("WARNING groupdetr_fast.data.unreadable: left out the") == 2
    rows = json.loads((config.output / "results.json").read_text())["epochs"]
    assert [row["unreadable_images"] for row in rows] == [2, 2, 2]

    stopped = replace(config, output=tmp_path / "stopped")  # resumed, it has no batch of the last epoch left to read
    status, log = run_process(stopped, terminate_before, "AdamW.step", 15)
    assert status == EXIT_STOPPED, log
    status, log = run_process(replace(stopped, resume=True))
    assert status == 0, log
    resumed = json.loads((stopped.output / "results.json").read_text())["epochs"]
    assert [row["unreadable_images"] for row in resumed] == [2, 2, 2]

    few = replace(config, output=tmp_path / "few", data=replace(config.data, max_unreadable_images=1))
    status, log = run_process(few)
    assert status == 1, log
    assert "2 of 10 images cannot be read, and 1 are allowed; the last: image file" in log

    status, log = run_process(replace(config, output=tmp_path / "strict", strict=True))
    assert status == 1, log
    assert "images cannot be read, and" not in log
    assert "cannot be read (" in log or "does not exist" in log


def with_own_evaluation_images(config, folder):
    """The same run, with images to evaluate on that a test may damage."""
    subprocess.run(["cp", "-r", config.data.val_images, folder], check=True)
    return replace(config, data=replace(config.data, val_images=folder))


def test_a_fault_of_an_evaluation_loses_no_epoch(config, undisturbed, tmp_path):
    config = with_own_evaluation_images(config, tmp_path / "images")
    image = tmp_path / "images" / "09.png"
    content = image.read_bytes()
    image.write_bytes(b"no image")
    status, log = run_process(config)  # evaluates after the second epoch
    assert status == 1, log
    assert log.strip().splitlines()[-1].startswith(f"error: image file {image}"), log
    assert latest_checkpoint(config.output).name == "epoch_0002"
    image.write_bytes(content)
    finish(config, undisturbed, "epoch_0002")


def test_evaluation_is_tried_before_the_first_step(config, tmp_path):
    config = with_own_evaluation_images(config, tmp_path / "images")
    (tmp_path / "images" / "03.png").write_bytes(b"no image")  # in the second batch
    status, log = run_process(config)
    assert status == 1, log
    assert f"error: image file {tmp_path}/images/03.png" in log
    assert latest_checkpoint(config.output) is None


def test_a_killed_worker_ends_in_one_sentence(config, undisturbed):
    with_workers = replace(config, data=replace(config.data, workers=2), checkpoint_every=1)
    status, log = run_process(with_workers, kill_worker_at, 4)
    assert status == 1, log
    last = log.strip().splitlines()[-1]
    assert last.startswith("error: a process that loads images died (")
    assert "resuming goes on from the newest checkpoint" in last
    finish(with_workers, undisturbed)


def hear_of_a_death(then):
    try:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
    except RuntimeError as error:
        if then == "nothing":
            raise
        if then == "made another error":
            raise AttributeError("'_OpNamespace' 'groupdetr_fast' object has no attribute 'an_op'") from error
        raise ValueError("a file that was closed in between")  # noqa: B904 (as if nobody had thought of it)


@pytest.mark.parametrize("then", ["nothing", "made another error", "followed by another error"])
def test_the_death_of_a_worker_is_told_wherever_it_was_heard_of(then, monkeypatch):
    """torch raises its error in the midst of whatever the program does, such as looking up an op for the first time."""
    monkeypatch.setattr(faults, "_hear_of_no_further_death", lambda: None)
    message = r"^a process that loads images died \(DataLoader worker \(pid 5\) is killed"
    with pytest.raises(TrainingError, match=message), faults.deaths_of_workers_explained(2):
        hear_of_a_death(then)
    with pytest.raises(AttributeError), faults.deaths_of_workers_explained(2):
        raise AttributeError("another") from ValueError("another")


@pytest.mark.parametrize("own", [TrainingStopped("stopped as asked"), TrainingError("too many images")])
def test_what_the_training_makes_of_a_death_stays_as_it_is(own):
    def stop_after_a_death():
        try:
            hear_of_a_death("nothing")
        except RuntimeError:
            raise own  # noqa: B904 (as where a request to stop came before the death)

    with pytest.raises(type(own), match=str(own)), faults.deaths_of_workers_explained(2):
        stop_after_a_death()


def test_steps_whose_loss_is_not_finite_are_skipped(config, undisturbed):
    status, log = run_process(config, spoil_images, 4)
    assert status == 0, log
    warnings = [line for line in log.splitlines() if "the loss is not finite: step skipped; image ids" in line]
    assert len(warnings) == 3  # one batch in each epoch
    assert all("4" in line.partition("image ids")[2] for line in warnings)
    results = json.loads((config.output / "results.json").read_text())
    assert [row["skipped_steps"] for row in results["epochs"]] == [1, 1, 1]
    assert all(value == value for row in results["epochs"] for value in row["train"].values())
    weights = final_weights(config)
    assert all(tensor.isfinite().all() for tensor in weights.values())  # those of batch norms too
    assert not same_weights(config, undisturbed)


def test_too_many_losses_that_are_not_finite_end_the_run(config):
    status, log = run_process(replace(config, max_skipped_steps=1), spoil_images, 1, 2, 3, 4, 5, 6)
    assert status == 1, log
    assert "error: 2 steps of epoch 1 had a loss or a gradient that is not finite, and 1 are allowed" in log
    status, log = run_process(replace(config, strict=True), spoil_images, 1)
    assert status == 1, log
    assert "error: 1 steps of epoch 1 had a loss" in log
