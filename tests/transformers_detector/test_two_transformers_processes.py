"""Trainings of detectors of transformers on two CPU processes, with gloo, are those of one process."""

import json
import multiprocessing
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from tiny_detectors import GROUPS, NAMES, batch_of, detector_of, model_of, processor_of

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from one_of_two_with_transformers import config_with
from test_two_processes import TORCHRUN, folder, launch, results, weights  # noqa: F401 (a fixture)

from groupdetr_fast.runs.train import train
from groupdetr_fast.targets import PackedTargets, StepTotals

SCRIPT = Path(__file__).with_name("one_of_two_with_transformers.py")
# Detectors with this package's kernels, and three with transformers' own losses, which count objects otherwise.
CASES = [(name, True) for name in NAMES]
CASES += [(name, False) for name in ("ConditionalDetr", "DabDetr", "DeformableDetr")]
PER_IMAGE = 2  # objects, where gradients are compared: DETR's cross entropy is a mean over those of a process


def run_on_two(folder, output, pretrained, **settings):  # noqa: F811
    done = launch([*TORCHRUN, SCRIPT, folder, output, pretrained, json.dumps(settings)])
    assert done.returncode == 0, done.stderr


def assert_same_training(found, expected):
    for row, other in zip(results(found)["epochs"], results(expected)["epochs"], strict=True):
        assert row["train"] == pytest.approx(other["train"], rel=1e-5)
        assert row["metrics"]["AP"] == pytest.approx(other["metrics"]["AP"], abs=1e-6)
    first, second = weights(found), weights(expected)
    assert first.keys() == second.keys()
    for name in first:
        # The gradient of a bias before a normalisation is 0 but for rounding, by whose size Adam divides it.
        if not re.search(r"input_proj\.\d+\.0\.bias$", name):
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sharded"),
    [("DeformableDetr", False), ("DeformableDetr", True), ("RfDetr", False)],
    ids=["groups added", "groups added, sharded", "groups of its own"],
)
def test_two_processes_train_as_one(name, sharded, folder, tmp_path):  # noqa: F811
    """With FSDP also after an interruption."""
    pretrained = tmp_path / "pretrained"
    model_of(name).save_pretrained(pretrained)
    processor_of(name).save_pretrained(pretrained)
    settings = {"num_groups": GROUPS, "short_sides": (64,), "eval_short_side": 64}
    train(config_with(folder, tmp_path / "one", pretrained, batch_size=2, **settings))
    settings |= {"batch_size": 1}
    if sharded:
        settings |= {"sharded": [f"{name}EncoderLayer", f"{name}DecoderLayer"]}
        run_on_two(folder, tmp_path / "two", pretrained, epochs=2, **settings)
        settings |= {"resume": True}
    run_on_two(folder, tmp_path / "two", pretrained, **settings)
    assert_same_training(tmp_path / "two", tmp_path / "one")


def gradients_of(model, detector, images, targets, totals=None):
    """Gradients of the trained weights of a detector, which ``model`` wraps or is."""
    model.zero_grad()
    detector.make_criterion()(model(images, None, targets), targets, totals)["loss"].backward()
    return {name: weight.grad.clone() for name, weight in detector.named_parameters() if weight.requires_grad}


def one_of(images, targets, index):
    return images[index : index + 1], PackedTargets.from_list(
        [{"labels": targets.labels[index], "boxes": targets.boxes[index]}]
    )


def steps_of_every_detector(rank, port, errors):
    torch.set_num_threads(1)
    images, targets = batch_of((PER_IMAGE, PER_IMAGE))
    name = None
    try:
        alone = {}
        for name, kernels in CASES:
            detector, totals = detector_of(name, accelerate_kernels=kernels), StepTotals.of([targets])
            # Image after image: torch's batch norm returns other gradients for some layouts that batches have.
            parts = [gradients_of(detector, detector, *one_of(images, targets, index), totals) for index in range(2)]
            alone[name, kernels] = {key: parts[0][key] + parts[1][key] for key in parts[0]}
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in names.items()}
        PartialState(cpu=True)  # which the losses of transformers ask how many processes there are
        for name, kernels in CASES:
            detector = detector_of(name, accelerate_kernels=kernels)
            wrapped = torch.nn.parallel.DistributedDataParallel(detector)
            found = gradients_of(wrapped, detector, *one_of(images, targets, rank))
            largest = max(gradient.abs().max() for gradient in alone[name, kernels].values()).item()
            torch.testing.assert_close(found, alone[name, kernels], rtol=1e-4, atol=1e-5 * largest)
        # Where one process has no objects; also with denoising queries, of which there are none then.
        for name in NAMES:
            denoising = {"num_denoising": 6} if name.startswith("RTDetr") or name in ("DFine", "Deimv2") else {}
            detector = detector_of(name, **denoising)
            wrapped = torch.nn.parallel.DistributedDataParallel(detector)
            for seed in range(2):  # the second forward pass finds out what the first backward pass lacked
                gradients_of(wrapped, detector, *batch_of((2, 1) if rank == 0 else (0, 0), seed=seed))
        errors.put(None)
        dist.destroy_process_group()
    except Exception as error:
        errors.put(f"{name}: {error}")


@pytest.mark.slow
def test_the_gradients_of_two_processes_are_those_of_one_for_every_detector():
    """And every weight has one, so that no process waits for another, in batches without objects too."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    processes = [context.Process(target=steps_of_every_detector, args=(rank, port, errors)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [errors.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert found == [None, None]
