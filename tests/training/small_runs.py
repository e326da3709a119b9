"""Trainings that take about a second, in processes that can be killed."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from groupdetr_fast import cli
from groupdetr_fast.data import AugmentationConfig, SkipUnreadable
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.evaluation.coco import CocoEvaluator
from groupdetr_fast.evaluation.detections import CollectedDetections
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import checkpoint, engine
from groupdetr_fast.training.config import OptimizationConfig

IMPORTED_BY = os.getpid()
EPOCHS = 3
IMAGES = 10  # 5 batches per epoch
SIZE = 32


def write_images(folder):
    """A data set of random images with random boxes, for training and evaluation alike. Returns its settings."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, annotations = [], []
    for image_id in range(1, IMAGES + 1):
        name = f"{image_id:02d}.png"
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for _ in range(rng.integers(1, 4)):
            x, y, width, height = (*rng.integers(0, SIZE // 2, 2).tolist(), *rng.integers(4, SIZE // 2, 2).tolist())
            box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
            category = int(rng.integers(1, 3))
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **box})
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return data_in(folder)


def data_in(folder, evaluated="instances.json"):
    """Settings of the data set that :func:`write_images` wrote; perhaps evaluated on other annotations than trained."""
    images = folder / "images"
    return DataConfig(
        train_images=images,
        train_annotations=folder / "instances.json",
        val_images=images,
        val_annotations=folder / evaluated,
        workers=0,
    )


def small_config(data, output):
    """A run with everything that draws random numbers: augmentation, dropout and denoising queries.

    It writes neither page nor curves, which would take longer than the training.
    """
    return CocoTrainingConfig(
        data=data,
        model=ModelConfig(
            model="dn_detr_r50",
            num_groups=2,
            num_queries=4,
            d_model=16,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            dim_feedforward=16,
            dropout=0.1,
            backbone="conv:8-16",
        ),
        augmentation=AugmentationConfig(
            short_sides=(24, 32), crop_short_sides=(32,), crop_min=16, crop_max=32, eval_short_side=32
        ),
        optimization=OptimizationConfig(epochs=EPOCHS, lr_drop=(2,), lr=1e-3, backbone_lr=1e-3, batch_size=2),
        output=output,
        evaluate_every=2,
        pictures=0,
        report=False,
        track=(),
    )


def final_weights(config):
    folder = config.output / "checkpoints" / f"epoch_{config.optimization.epochs:04d}"
    return load_file(folder / checkpoint.WEIGHTS)


def same_weights(config, weights):
    found = final_weights(config)
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def run_process(config, fault=None, *arguments):
    """Train in a process of its own, which calls ``fault(*arguments)`` first. Returns its exit status and output."""
    config.output.mkdir(parents=True, exist_ok=True)
    log = config.output / "log.txt"
    # A fork server imports this module once, and with it torch; every training is a fresh fork of it. It finds the
    # module by the variable alone, and says nothing if it does not.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])
    process = context.Process(target=_main, args=(config, log, fault, arguments))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    process.join(timeout=300)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode, log.read_text()


def _main(config, log, fault, arguments):
    file = log.open("w")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file.fileno(), stream.fileno())
    assert os.getpid() != IMPORTED_BY, "the fork server lacks this module, which each training imports for itself"
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers: so they have the fault too
    if fault is not None:
        fault(*arguments)
    cli.run(lambda: lambda: train(config))


# Faults: each changes the process that it is called in.

OWNERS = {
    "AdamW": torch.optim.AdamW,
    "CocoEvaluator": CocoEvaluator,
    "CollectedDetections": CollectedDetections,
    "Path": Path,
    "Tensor": torch.Tensor,
    "Trainer": engine.Trainer,
    "checkpoint": checkpoint,
    "os": os,
    "shutil": shutil,
    "torch": torch,
}


def kill_before(place, number):
    """``kill -9`` before the call with this number, counted from 1, of a function such as "os.rename"."""
    _call_instead(place, number, lambda original, *args, **kwargs: _signal(signal.SIGKILL))


def kill_before_it_takes_its_place(name, number):
    """``kill -9`` before the file of this name that is written with this number, counted from 1, replaces the last."""
    replace, times = os.replace, itertools.count(1)

    def replace_or_die(source, target):
        if Path(target).name == name and next(times) == number:
            _signal(signal.SIGKILL)
        return replace(source, target)

    os.replace = replace_or_die


def kill_halfway(place, number):
    """``kill -9`` in a call of a function that writes a file, when half of the file is written."""

    def write_half(original, content, path, **kwargs):
        original(content, path, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        _signal(signal.SIGKILL)

    _call_instead(place, number, write_half)


def kill_some_time_after_the_first_step(seconds):
    """``kill -9`` by the clock, wherever the training is then."""

    def start_clock(original, *args, **kwargs):
        threading.Timer(seconds, _signal, [signal.SIGKILL]).start()
        return original(*args, **kwargs)

    _call_instead("AdamW.step", 1, start_clock)


def terminate_before(place, number):
    """SIGTERM before a call."""

    def terminate(original, *args, **kwargs):
        _signal(signal.SIGTERM)
        return original(*args, **kwargs)

    _call_instead(place, number, terminate)


def signal_group_before(number, place, call):
    """A signal to the process and all that it has started, as a launcher or a terminal sends it, before a call."""
    os.setpgid(0, 0)

    def send(original, *args, **kwargs):
        os.killpg(0, number)
        return original(*args, **kwargs)

    _call_instead(place, call, send)


def stop_and_kill_workers_before(place, call):
    """SIGTERM to the training and ``kill -9`` of its workers."""

    def stop(original, *args, **kwargs):
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        _signal(signal.SIGTERM)
        return original(*args, **kwargs)

    _call_instead(place, call, stop)


def announce_calls(place, seconds):
    """Print the name of a function whenever it is called, and let every call take some time."""

    def announce(original, *args, **kwargs):
        print(place, flush=True)
        time.sleep(seconds)
        return original(*args, **kwargs)

    owner, name = place.split(".")
    original = getattr(OWNERS[owner], name)
    setattr(OWNERS[owner], name, lambda *args, **kwargs: announce(original, *args, **kwargs))


def kill_worker_at(image_id):
    """``kill -9`` of the process that loads an image to train on."""
    _spoil_samples([image_id], lambda image: _signal(signal.SIGKILL))


def spoil_images(*image_ids):
    """Images to train on whose pixels are not numbers, so that the loss is none either."""
    original = engine.Trainer.run_step

    def spoiled(self, batches):
        for batch in batches:
            for index in set(image_ids).intersection(batch.image_ids):
                batch.images[batch.image_ids.index(index)] = float("nan")
        return original(self, batches)

    engine.Trainer.run_step = spoiled


def _call_instead(place, number, replacement):
    owner_name, name = place.split(".")
    owner = OWNERS[owner_name]
    original, count = getattr(owner, name), 0

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return replacement(original, *args, **kwargs) if count == number else original(*args, **kwargs)

    setattr(owner, name, counting)


def _spoil_samples(image_ids, spoil):
    original = SkipUnreadable.__getitem__

    def replacement(self, key):
        image, target = original(self, key)
        return (spoil(image) if target["image_id"] in image_ids else image), target

    SkipUnreadable.__getitem__ = replacement


def _signal(number):
    os.kill(os.getpid(), number)
