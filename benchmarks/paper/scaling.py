"""What a training step costs on 8, 64 and 512 GPUs: bytes, and times on paper, from what was measured on one.

A step is computing, plus what is sent between GPUs and not hidden behind the backward pass, plus what every process
waits for. An epoch adds the evaluation and the checkpoint, which more GPUs make no faster. Computing is that of one GPU
in ``results/gpu/step.jsonl``, images and metric are those of one core in ``results/coco_size.csv``. The weights are
counted from the model, on tensors without data; the machine is that of the constants below.

    python benchmarks scaling            print the tables
    python benchmarks scaling --write    and put them into docs/scaling.md
    python benchmarks scaling --check    fail if docs/scaling.md has other ones
"""

import csv
import functools
import json
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import groupdetr_fast as gd
from groupdetr_fast.evaluation.detections import ImageDetections
from harness.documents import section_command, significant, table
from harness.places import DOCS, RESULTS
from harness.results import OURS

from .roofline import FLOAT32

DOCUMENT = DOCS / "scaling.md"
SECTION = "scaling"

GPUS = (8, 64, 512)
BATCH = 2  # images per GPU, as in the paper
IMAGES, EVALUATED = 118_287, 5_000  # COCO train2017 and val2017
DETECTIONS = 100  # per image

# NVIDIA DGX H100, data sheet.
GPUS_PER_NODE = 8
NVLINK = 450e9  # bytes/s of a GPU in one direction
NETWORK = 50e9  # bytes/s of a GPU in one direction: one 400 Gbit/s adapter each

# Assumptions, which a first measurement on several GPUs should replace.
HIDDEN = 0.8  # of the backward pass that gradients can be sent behind: the last bucket is known at its end alone
LOCAL_LATENCY, REMOTE_LATENCY = 5e-6, 15e-6  # s for each hop of a collective
DISK = 1e9  # bytes/s to a shared file system

MODELS = ("conditional_detr_r50", "dino_4scale_r50", "mask2former_r50")
ADAM_STATES = 2  # numbers per weight


@functools.cache
def weights(name: str, num_groups: int = 11) -> tuple[int, int]:
    """Numbers of a detector: of all weights, and of those that are trained."""
    with torch.device("meta"):
        model = gd.build_model(name, num_classes=91, num_groups=num_groups)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


@dataclass(frozen=True)
class Computing:
    """A whole training step on one GPU, matching, loss and optimiser included.

    Attributes:
        device: its name.
        seconds: of a step whose kernels the host launches one by one, as it does with several processes.
        graph: of a step that is a CUDA graph, which is what the GPU itself takes.
        forward: share of the forward pass in a step.
        backward: share of the backward pass.
    """

    device: str
    seconds: float
    graph: float
    forward: float
    backward: float


@functools.cache
def computing() -> Computing:
    """Of Conditional DETR with 11 groups and images of 800 x 1333 pixels, from the newest rows."""
    rows = [json.loads(line) for line in (RESULTS / "gpu" / "step.jsonl").read_text().splitlines()]

    def newest(kind: str, contender: str = OURS) -> dict[str, Any]:
        wanted = {
            "kind": kind,
            "model": MODELS[0],
            "groups": 11,
            "batch": BATCH,
            "contender": contender,
            "status": "ok",
        }
        return next(row for row in reversed(rows) if wanted.items() <= row.items())

    step, graph, parts = newest("step"), newest("step", "CUDA graph"), newest("parts")
    environment = next(row for row in rows if row["kind"] == "environment" and row["run"] == step["run"])
    seconds = {name: parts[name] for name in ("backbone", "encoder", "decoder", "criterion", "backward", "optimiser")}
    forward = sum(seconds[name] for name in ("backbone", "encoder", "decoder"))
    total = sum(seconds.values())
    return Computing(environment["device"], step["wall"], graph["wall"], forward / total, seconds["backward"] / total)


@functools.cache
def measured(measurement: str, case: str) -> dict[str, Any]:
    """The newest row of a case of ``python benchmarks coco_size``, with seconds of one core for ``"each"`` image."""
    row = newest_rows()[measurement, case]
    return {**row, "each": float(row["cpu_seconds"]) / int(row["count"])}


def newest_rows() -> dict[tuple[str, str], dict[str, str]]:
    """The newest row of each case of ``python benchmarks coco_size``."""
    with (RESULTS / "coco_size.csv").open(newline="") as file:
        return {(row["measurement"], row["case"]): row for row in csv.DictReader(file)}


def loading() -> float:
    """Seconds of one core for an image."""
    return measured("images", "loaded by one worker")["each"]


def metric() -> float:
    """Seconds of one core for COCO's metric over val2017."""
    return measured("metric", f"boxes, {DETECTIONS} detections an image")["each"] * EVALUATED


@dataclass(frozen=True)
class Link:
    """What one collective sends and receives per GPU, and how long it takes."""

    local: float  # bytes over NVLink
    remote: float  # bytes over the network
    seconds: float


@dataclass(frozen=True)
class Cluster:
    """So many GPUs, in full nodes."""

    gpus: int

    @property
    def nodes(self) -> int:
        return self.gpus // GPUS_PER_NODE

    @property
    def latency(self) -> float:
        """Of a collective of a few bytes: there and back in a node, and up and down a tree of nodes."""
        return 2 * (GPUS_PER_NODE - 1) * LOCAL_LATENCY + 2 * math.log2(self.nodes) * REMOTE_LATENCY

    def half_sum(self, size: float) -> Link:
        """Reduce-scatter or all-gather of ``size`` bytes: in each node first, then between GPUs of the same number."""
        local = size * (GPUS_PER_NODE - 1) / GPUS_PER_NODE
        remote = size / GPUS_PER_NODE * (self.nodes - 1) / self.nodes
        return Link(local, remote, local / NVLINK + remote / NETWORK + self.latency / 2)

    def all_reduce(self, size: float) -> Link:
        half = self.half_sum(size)
        return Link(2 * half.local, 2 * half.remote, 2 * half.seconds)


def step(cluster: Cluster, sharded: bool = False) -> dict[str, float]:
    """Seconds of the parts of a step of Conditional DETR that add up to it."""
    own = computing()
    total, trained = weights(MODELS[0])
    sent = cluster.half_sum(trained * FLOAT32).seconds  # FSDP: gradients are only scattered,
    if sharded:
        sent += 2 * cluster.half_sum(total * FLOAT32).seconds  # and weights gathered forward and backward
    else:
        sent *= 2
    backward = own.seconds * own.backward
    waiting = 2 * cluster.latency  # the number of objects before, and whether the loss is finite after
    return {"computing": own.seconds, "gradients": max(0.0, sent - HIDDEN * backward), "waiting": waiting}


def epoch(cluster: Cluster) -> dict[str, float]:
    """Seconds of the parts of an epoch of COCO that is followed by an evaluation and a checkpoint."""
    steps = math.ceil(IMAGES / (BATCH * cluster.gpus))
    parts = {name: seconds * steps for name, seconds in step(cluster).items()}
    parts["predicting"] = math.ceil(EVALUATED / (BATCH * cluster.gpus)) * computing().seconds * computing().forward
    gathered = detections() * (cluster.gpus - 1) / cluster.gpus
    parts["metric"] = metric() + gathered / (NETWORK if cluster.nodes > 1 else NVLINK)
    parts["checkpoint"] = weights(MODELS[0])[0] * FLOAT32 * (1 + ADAM_STATES) / DISK
    return parts


@functools.cache
def detections() -> int:
    """Bytes of all detections of val2017, as processes send them to each other."""
    one = ImageDetections(np.zeros(DETECTIONS, dtype=np.int64), np.zeros(DETECTIONS), np.zeros((DETECTIONS, 4)))
    return len(pickle.dumps({0: one})) * EVALUATED


def limit(parts: dict[str, float]) -> str:
    """The largest part besides computing, with its share."""
    name = max((name for name in parts if name != "computing"), key=parts.get)
    return f"{name}, {100 * parts[name] / sum(parts.values()):.0f} %"


def tables() -> str:
    own, one = computing(), epoch(Cluster(GPUS[0]))
    clusters = [Cluster(gpus) for gpus in GPUS]
    megabytes = 1e6
    rows = []
    for cluster in clusters:
        parts, link = step(cluster), cluster.all_reduce(weights(MODELS[0])[1] * FLOAT32)
        total = sum(parts.values())
        rows.append(
            [
                str(cluster.gpus),
                str(BATCH * cluster.gpus),
                significant(link.local / megabytes),
                significant(link.remote / megabytes),
                significant(link.seconds * 1e3),
                significant(parts["computing"] * 1e3),
                significant(parts["gradients"] * 1e3),
                significant(parts["waiting"] * 1e3),
                f"{100 * parts['computing'] / total:.0f} %",
                significant(BATCH * loading() / total),
                significant(BATCH * loading() / own.graph),
            ]
        )
    header = ["GPUs", "images a step", "NVLink, MB", "network, MB", "all-reduce, ms", "computing, ms"]
    header += ["not hidden, ms", "waiting, ms", "computing", "cores to load images, per GPU"]
    header += ["the same for the GPU's own time"]
    parts_of_epochs = []
    for cluster in clusters:
        parts = epoch(cluster)
        steps = math.ceil(IMAGES / (BATCH * cluster.gpus))
        seconds = sum(parts.values())
        speed = sum(one.values()) / seconds * GPUS[0] / cluster.gpus
        row = [str(cluster.gpus), str(steps), *(significant(value) for value in parts.values())]
        parts_of_epochs.append([*row, significant(seconds), f"{100 * speed:.0f} %", limit(parts)])
    memory = []
    for name in MODELS:
        total, trained = weights(name)
        state = total * FLOAT32 + trained * FLOAT32 * (1 + ADAM_STATES)
        memory.append([f"`{name}`", significant(total / 1e6), significant(trained * FLOAT32 / megabytes)])
        memory[-1] += [significant(state / megabytes), *(significant(state / gpus / megabytes) for gpus in GPUS)]
    sharding = [
        [str(c.gpus), *(significant(1e3 * sum(step(c, sharded).values())) for sharded in (False, True))]
        for c in clusters
    ]
    return "\n\n".join(
        [
            f"Measured: a step of Conditional DETR R50 with 11 groups of 300 queries and {BATCH} images of 800 x 1333 "
            f"pixels on one {own.device}, {own.seconds * 1e3:.0f} ms where a virtual machine's host launches its "
            f"kernels one by one, {own.graph * 1e3:.0f} ms of the GPU as a CUDA graph (docs/performance.md); "
            f"{100 * own.forward:.0f} % of it the forward and {100 * own.backward:.0f} % the backward pass; "
            f"{loading() * 1e3:.1f} ms of a core an image and {metric():.1f} s of one for COCO's metric, on an "
            f"{measured('images', 'loaded by one worker')['cpu']}. Constants: NVLink {NVLINK / 1e9:g} GB/s and network "
            f"{NETWORK / 1e9:g} GB/s a GPU and direction, {GPUS_PER_NODE} GPUs a node. Assumptions: "
            f"{100 * HIDDEN:g} % of the backward pass can hide sending; "
            f"{LOCAL_LATENCY * 1e6:g} and {REMOTE_LATENCY * 1e6:g} µs a hop within and between nodes; "
            f"{DISK / 1e9:g} GB/s to disk. 1 MB = 10^6 bytes.",
            "### What one machine takes, measured",
            _measurements(),
            "### A step",
            table(header, rows),
            "### An epoch of COCO, evaluated at its end, in seconds",
            table(["GPUs", "steps", *one, "together", "of ideal speed-up", "limit"], parts_of_epochs),
            "### What each GPU holds besides activations: weights, gradients and Adam's moments",
            table(
                ["model, K = 11", "million weights", "gradients, MB", "DDP, MB", *(f"FSDP on {n}, MB" for n in GPUS)],
                memory,
            ),
            "### A step with whole and with sharded weights, in milliseconds",
            table(["GPUs", "DDP", "FSDP"], sharding),
        ]
    )


def _measurements() -> str:
    """A table of the newest rows of ``python benchmarks coco_size``."""
    rows = []
    for (name, case), row in newest_rows().items():
        count, seconds = int(row["count"]), float(row["cpu_seconds"])
        memory = f"{int(row['bytes']) / 2**20:.0f}" if row["bytes"] else "-"
        rows.append([name, case, f"{count} {row['unit']}", significant(seconds), significant(count / seconds), memory])
        rows[-1].append(row["cpu"])
    header = ["measurement", "case", "of", "seconds of a core", "a second", "memory at the peak, MiB", "processor"]
    return table(header, rows)


def main() -> None:
    section_command(__doc__, DOCUMENT, SECTION, tables)
