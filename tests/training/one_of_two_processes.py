"""One process of a training on two, started by torchrun.

Arguments: folder of the data, output, kind of run, and settings of the optimisation as json.
"""

import atexit
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from small_runs import (
    announce_calls,
    data_in,
    kill_before,
    kill_worker_at,
    small_config,
    spoil_images,
    terminate_before,
)

from groupdetr_fast import cli
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.evaluation.coco import CocoEvaluator
from groupdetr_fast.layers.backbone import Backbone
from groupdetr_fast.runs import train, trainer
from groupdetr_fast.training import batch_size
from groupdetr_fast.training.engine import Trainer


def config_of(folder, output, **optimization):
    """A run in which what is computed of an image depends on it alone: neither random numbers nor batch statistics."""
    config = small_config(data_in(folder, evaluated="seven.json"), output)
    return replace(
        config,
        model=replace(config.model, model="conditional_detr_r50", dropout=0.0, backbone="resnet18", backbone_stages=2),
        augmentation=AugmentationConfig(short_sides=(32,), flip=0.0, crop=0.0, eval_short_side=32),
        optimization=replace(config.optimization, **optimization),
        evaluate_every=1,
        pictures=5,
        track=("tensorboard",),
    )


def shard_weights(layers=("TransformerEncoderLayer", "ConditionalDecoderLayer")):
    """Turn FSDP on, which Accelerate does on GPUs alone; ``layers`` are the classes that are sharded on their own."""
    original = trainer.build_accelerator

    def sharding(*args, **kwargs):
        accelerator = original(*args, **kwargs)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(layers),
        )
        accelerator.state.distributed_type = DistributedType.FSDP
        return accelerator

    trainer.build_accelerator = sharding


def forbid_writing(folder):
    """Raise in this process at any file that it opens for writing, renames or removes in a folder."""
    forbidden = os.fspath(folder)

    def check(event, arguments):
        writes = event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(arguments[0]).startswith(forbidden):
            raise AssertionError(f"process {os.environ['RANK']}: {event} {arguments[0]}")

    sys.addaudithook(check)


def forbid_metrics():
    """Raise in this process if it computes metrics: that is for one process, as they need not be the same in all."""

    def refuse(evaluator):
        raise AssertionError(f"process {os.environ['RANK']} computes metrics")

    CocoEvaluator.summarize = refuse


def give_memory_for(images):
    """Let this process have memory for steps on so many images; it counts as that of a GPU."""

    class Memory:
        def clear(self):
            pass

        def peak(self):
            return 0.5

    original = Backbone.forward

    def forward(self, batch):
        if len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return original(self, batch)

    Backbone.forward = forward
    batch_size.memory_of = lambda device: Memory()


def say_when_saved():
    """Say of every checkpoint of this process at which epoch and batch it is written."""
    original = Trainer.save

    def save(trainer):
        at = (trainer.state.epoch, trainer.state.current.batches)
        original(trainer)
        sys.stderr.write(f"process {os.environ['RANK']} saved at {at}\n")

    Trainer.save = save


def tell_threads_at_exit():
    """Say which threads are left when the interpreter ends, which is after what was registered later has run."""

    def tell():
        names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
        sys.stderr.write(f"threads of process {os.environ['RANK']}: {' '.join(sorted(names))}\n")

    if sys.platform == "linux":
        atexit.register(tell)


def main():
    tell_threads_at_exit()
    folder, output, kind, optimization = sys.argv[1:]
    torch.set_num_threads(1)
    config = config_of(Path(folder), Path(output), **json.loads(optimization))
    config = replace(config, resume=kind.endswith("resumed"))
    if kind.startswith("announced "):  # and with processes that load images
        config = replace(config, data=replace(config.data, workers=1))
        announce_calls(kind.split()[1], 0.2)
    if kind.startswith("sharded"):
        shard_weights()
    if kind == "worker killed":
        config = replace(config, data=replace(config.data, workers=1))
    if kind == "memory of its own":
        give_memory_for(7 - 4 * int(os.environ["RANK"]))
    if kind == "with its page":
        config = replace(config, report=True)
    if kind == "hurried":
        say_when_saved()
    if kind == "spoiled":
        spoil_images(4)
    if kind == f"process {os.environ['RANK']} killed":
        kill_before("AdamW.step", 7)
    if os.environ["RANK"] == "1":
        if kind == "worker killed":
            kill_worker_at(4)
        if kind == "hurried":  # one process wants a checkpoint after every step
            config = replace(config, checkpoint_minutes=1e-9)
        if kind.endswith("stopped"):  # one process is told to stop, and all do, two steps later
            terminate_before("AdamW.step", 6)
        forbid_writing(output)
        forbid_metrics()

    def run():
        found = [row.get("metrics") for row in train.train(config)["epochs"]]
        sys.stderr.write(f"metrics of process {os.environ['RANK']}: {json.dumps(found)}\n")  # in one piece

    cli.run(lambda: run)


if __name__ == "__main__":
    main()
