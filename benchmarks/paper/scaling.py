"""What a training step costs on 8, 64 and 512 GPUs: bytes, and times on paper. A model; nothing of it is measured.

A step is computing, plus what is sent between GPUs and not hidden behind the backward pass, plus what every process
waits for. An epoch adds the evaluation and the checkpoint, which more GPUs make no faster. The operations and the
weights are counted from the model, on tensors without data; the machine is that of the constants below.

    python benchmarks scaling            print the tables
    python benchmarks scaling --write    and put them into docs/scaling.md
    python benchmarks scaling --check    fail if docs/scaling.md has other ones
"""

import functools
import math
import pickle
from dataclasses import dataclass

import torch

import groupdetr_fast as gd
from cpu import bench_conditional_detr
from harness.cases import Detection
from harness.documents import section_command, significant, table
from harness.places import DOCS

from .flops import step_operations
from .roofline import FLOAT32, MEMORY_BANDWIDTH, TENSOR_PEAK, Traffic

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

# Assumptions, which a first measurement should replace.
UTILISATION = 0.5  # of the tensor cores' peak, while they multiply
LAUNCH = 8e-6  # s of the host for each operator
HIDDEN = 0.8  # of the backward pass that gradients can be sent behind: the last bucket is known at its end alone
LOCAL_LATENCY, REMOTE_LATENCY = 5e-6, 15e-6  # s for each hop of a collective
DECODE = 25e-3  # s of one core to decode and transform an image of COCO
METRIC = 60.0  # s of one core for COCO's metric over val2017, in each process alike
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


class CountedTraffic(Traffic):
    """Counts operators that read or write memory, besides their bytes."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        before = self.bytes
        results = super().__torch_dispatch__(operator, types, args, kwargs)
        self.number += self.bytes > before
        return results


@dataclass(frozen=True)
class Computing:
    """Forward and backward pass of a step on one GPU, as plain eager PyTorch runs it."""

    operations: int
    bytes: float
    operators: int

    @property
    def device(self) -> float:
        """Seconds of the GPU: its products of matrices, and its memory."""
        return self.operations / (TENSOR_PEAK * UTILISATION) + self.bytes / MEMORY_BANDWIDTH

    @property
    def host(self) -> float:
        """Seconds of the host that starts the operators."""
        return self.operators * LAUNCH

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)


@functools.cache
def computing() -> Computing:
    """Of Conditional DETR with images of 800 x 1333 pixels; half of the float32 bytes, as in bfloat16."""
    case = Detection(num_groups=11, batch=BATCH, height=800, width=1333)
    with torch.device("meta"):
        model = bench_conditional_detr.build(case).train()
    images, masks, _ = case.make()
    with CountedTraffic() as counted:
        out = model(images.to("meta"), masks.to("meta"))
        (out.logits.sum() + out.boxes.sum()).backward()
    return Computing(step_operations(case), counted.bytes / 2, counted.number)


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
    alone = computing().seconds
    total, trained = weights(MODELS[0])
    sent = cluster.half_sum(trained * FLOAT32).seconds  # FSDP: gradients are only scattered,
    if sharded:
        sent += 2 * cluster.half_sum(total * FLOAT32).seconds  # and weights gathered forward and backward
    else:
        sent *= 2
    backward = alone * 2 / 3
    waiting = 2 * cluster.latency  # the number of objects before, and whether the loss is finite after
    return {"computing": alone, "gradients": max(0.0, sent - HIDDEN * backward), "waiting": waiting}


def epoch(cluster: Cluster) -> dict[str, float]:
    """Seconds of the parts of an epoch of COCO that is followed by an evaluation and a checkpoint."""
    steps = math.ceil(IMAGES / (BATCH * cluster.gpus))
    parts = {name: seconds * steps for name, seconds in step(cluster).items()}
    parts["predicting"] = math.ceil(EVALUATED / (BATCH * cluster.gpus)) * computing().seconds / 3
    gathered = detections() * (cluster.gpus - 1) / cluster.gpus
    parts["metric"] = METRIC + gathered / (NETWORK if cluster.nodes > 1 else NVLINK)
    parts["checkpoint"] = weights(MODELS[0])[0] * FLOAT32 * (1 + ADAM_STATES) / DISK
    return parts


@functools.cache
def detections() -> int:
    """Bytes of all detections of val2017, as processes send them to each other."""
    entry = {"image_id": 0, "category_id": 1, "score": 0.5, "bbox": [0.5, 1.5, 2.5, 3.5]}
    one = {0: [dict(entry, score=index / 7) for index in range(DETECTIONS)]}
    return len(pickle.dumps(one)) * EVALUATED


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
                significant(BATCH * DECODE / total),
            ]
        )
    header = ["GPUs", "images a step", "NVLink, MB", "network, MB", "all-reduce, ms", "computing, ms"]
    header += ["not hidden, ms", "waiting, ms", "computing", "cores to load images, per GPU"]
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
            f"Constants: NVLink {NVLINK / 1e9:g} GB/s and network {NETWORK / 1e9:g} GB/s a GPU and direction, "
            f"{GPUS_PER_NODE} GPUs a node, {TENSOR_PEAK / 1e12:g} TFLOP/s in bfloat16. Assumptions: "
            f"{100 * UTILISATION:g} % of that peak reached; {LAUNCH * 1e6:g} µs of the host an operator; "
            f"{100 * HIDDEN:g} % of the backward pass can hide sending; "
            f"{LOCAL_LATENCY * 1e6:g} and {REMOTE_LATENCY * 1e6:g} µs a hop within and between nodes; "
            f"{DECODE * 1e3:g} ms of a core an image; {METRIC:g} s for COCO's metric; {DISK / 1e9:g} GB/s to disk. "
            f"Conditional DETR R50 with 11 groups of 300 queries, {BATCH} images of 800 x 1333 pixels a GPU: "
            f"{own.operations / 1e12:.2f} TFLOP, {own.bytes / 1e9:.1f} GB and {own.operators} operators a step: "
            f"{own.device * 1e3:.0f} ms of the GPU and {own.host * 1e3:.0f} ms of the host, side by side. "
            "1 MB = 10^6 bytes.",
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


def main() -> None:
    section_command(__doc__, DOCUMENT, SECTION, tables)
