"""What each kernel must move and compute, and how fast an H100 could do that at best: on paper, nothing is run.

A floor is the largest of four times: that of the bytes that must pass between memory and the chip, and those of the
operations, the exponentials and the integer operations on the units that compute them, each at its peak. A kernel reads
each input once and writes each result once if its working set fits on the chip; the plain PyTorch version (naive.py, or
the op's reference) is made of operators, each of which reads and writes its own operands. These are counted from the
operators that PyTorch really calls, on tensors without data.

    python benchmarks roofline            print the tables
    python benchmarks roofline --write    and put them into docs/gpu_kernels.md
    python benchmarks roofline --check    fail if docs/gpu_kernels.md has other ones
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_reference
from harness import naive
from harness.documents import GPU_KERNELS, section_command, significant, table

SECTION = "roofline"

# NVIDIA H100 SXM5 80 GB, data sheet (dense, without sparsity).
MEMORY_BANDWIDTH = 3.35e12  # bytes/s, HBM3
TENSOR_PEAK = 989e12  # operations/s, bfloat16 tensor cores
VECTOR_PEAK = 67e12  # operations/s, float32
L2_BYTES = 50e6
HOST_BANDWIDTH = 64e9  # bytes/s, PCIe 5 x16, one direction

# Results per clock and multiprocessor: CUDA programming guide, throughput of native arithmetic instructions, compute
# capability 9.0. The clock is that of TENSOR_PEAK, with which Shah et al. (2024, "FlashAttention-3") count 3.9e12
# exponentials a second.
MULTIPROCESSORS = 132
CLOCK = 1.83e9  # Hz
EXPONENTIAL_PEAK = 16 * MULTIPROCESSORS * CLOCK
INTEGER_PEAK = 64 * MULTIPROCESSORS * CLOCK  # multiplications, shifts, logic and comparisons of 32 bits

TORCH = "torch " + ".".join(torch.__version__.split(".")[:2])  # whose operators are counted
SECTOR = 32  # bytes, the least that is read from memory

BFLOAT16, FLOAT32, INT64 = 2, 4, 8


@dataclass(frozen=True)
class Setting:
    """A detector of the paper in training: its decoder, and images of 800 x 1333 pixels with 20 objects each."""

    detector: str
    num_queries: int
    batch: int
    num_groups: int = 11
    layers: int = 6
    heads: int = 8
    channels: int = 32  # per head
    classes: int = 91
    targets: int = 20
    scale: float = 1.0  # of the image's sides

    def __str__(self) -> str:
        return f"{self.detector}, K = {self.num_groups}, N = {self.num_queries}, batch {self.batch}"

    @property
    def length(self) -> int:
        return self.num_groups * self.num_queries

    @property
    def groups(self) -> QueryGroups:
        return QueryGroups(self.num_groups, self.num_queries)

    @property
    def maps(self) -> list[tuple[int, int]]:
        """Sizes of DINO's four feature maps, of strides 8 to 64."""
        height, width = round(800 * self.scale), round(1333 * self.scale)
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32, 64)]

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.maps)


@dataclass(frozen=True)
class Demand:
    """Bytes to move and operations to compute; ``peak`` is of the units that compute them.

    Exponentials and integer operations have units of their own, which work beside the others. They are counted where
    they may be what takes longest: in attention.
    """

    bytes: float
    operations: float
    peak: float = VECTOR_PEAK
    bandwidth: float = MEMORY_BANDWIDTH
    exponentials: float = 0
    integers: float = 0

    @property
    def times(self) -> dict[str, float]:
        """Seconds by what takes them."""
        return {
            "memory": self.bytes / self.bandwidth,
            "compute": self.operations / self.peak,
            "exponentials": self.exponentials / EXPONENTIAL_PEAK,
            "integers": self.integers / INTEGER_PEAK,
        }

    @property
    def seconds(self) -> float:
        return max(self.times.values())

    @property
    def bound(self) -> str:
        return max(self.times, key=self.times.get)


@dataclass(frozen=True)
class KernelOnPaper:
    """A kernel's own work, and that of the plain PyTorch version."""

    name: str
    own: Callable[[Setting], Demand]
    plain: Callable[[Setting], Demand]


SETTINGS = [
    Setting(detector, num_queries, batch)
    for detector, num_queries in (("Conditional DETR", 300), ("DINO", 900))
    for batch in (2, 16)
]


# --- What plain PyTorch moves ---


class Traffic(TorchDispatchMode):
    """Adds up the bytes of operators, if each reads its inputs from memory and writes its results there."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        reads, writes = list(_tensors((args, kwargs))), list(_tensors(results))
        storages = {tensor.untyped_storage()._cdata for tensor in reads}
        is_view = all(tensor.untyped_storage()._cdata in storages for tensor in writes)
        if (operator._schema.is_mutable or not is_view) and "empty" not in operator.name():
            self.bytes += sum(map(_size, reads + writes))
        return results


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    """Bytes that reading a tensor touches: what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count(run: Callable[..., Tensor], *inputs: Tensor, backward: bool, peak: float) -> Demand:
    """The work of a function of tensors on the device ``meta``, or of its backward pass alone."""
    inputs = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        out = run(*inputs)
        before = traffic.bytes, flops.get_total_flops()
        if not backward:
            return Demand(*before, peak)
        torch.autograd.grad(out, [tensor for tensor in inputs if tensor.requires_grad], torch.empty_like(out))
        return Demand(traffic.bytes - before[0], flops.get_total_flops() - before[1], peak)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- grouped_attention, one decoder layer ---


DROPOUT = 0.1
DROPOUT_OPERATIONS = 3  # a score: multiply-add, comparison (is_kept in triton_blocks.py) and choice


def attention(s: Setting, backward: bool, dropout: float = 0.0) -> Demand:
    """Forward: queries, keys, values in, result and log-sum-exps out; two products. Backward recomputes: five.

    Both take one exponential a score. What dropout keeps is computed by each kernel: one of forward, two of backward,
    of which that of keys and values chooses twice. Hashes of rows and columns are few beside scores.
    """
    rows = s.batch * s.length * s.heads
    tensor = rows * s.channels * BFLOAT16
    scores = rows * s.num_queries
    product = 2 * scores * s.channels
    if backward:  # in: query, key, value, result, its gradient, log-sum-exps; out: three gradients
        moved = 8 * tensor + rows * FLOAT32
        integers = (2 * DROPOUT_OPERATIONS + 1) * scores if dropout else 0
        return Demand(moved, 5 * product, TENSOR_PEAK, exponentials=scores, integers=integers)
    integers = DROPOUT_OPERATIONS * scores if dropout else 0
    return Demand(4 * tensor + rows * FLOAT32, 2 * product, TENSOR_PEAK, exponentials=scores, integers=integers)


def plain_attention(s: Setting, backward: bool, dropout: float = 0.0) -> Demand:
    inputs = [meta(s.batch, s.length, s.heads, s.channels, dtype=torch.bfloat16) for _ in range(3)]
    naive.block_mask(s.groups, inputs[0].device)  # made once for many steps
    return count(
        lambda *qkv: naive.explicit_mask_attention(*qkv, s.groups, dropout_p=dropout),
        *inputs,
        backward=backward,
        peak=TENSOR_PEAK,
    )


def kept_for_backward(s: Setting) -> tuple[float, float]:
    """Bytes of one decoder layer, besides its inputs: of the kernel and of the explicit mask."""
    rows = s.batch * s.length * s.heads
    own = rows * s.channels * BFLOAT16 + rows * FLOAT32
    inputs = [meta(s.batch, s.length, s.heads, s.channels, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = naive.explicit_mask_attention(*inputs, s.groups)
    known = {tensor.untyped_storage()._cdata for tensor in (*inputs, naive.block_mask(s.groups, out.device))}
    plain = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in known)
    return own, plain


# --- Matching and loss, all decoder layers ---

PAIR_OPERATIONS = 60  # about, for the focal cost, L1 and GIoU of a query and a target


def matching_cost(s: Setting) -> Demand:
    queries = s.layers * s.batch * s.length
    pairs = queries * s.targets
    logits = queries * min(s.classes * FLOAT32, s.targets * SECTOR)  # only the classes of the image's targets
    return Demand(logits + queries * 4 * FLOAT32 + pairs * FLOAT32, pairs * PAIR_OPERATIONS)


def plain_matching_cost(s: Setting) -> Demand:
    targets = s.batch * s.targets
    work = count(
        naive.cross_image_cost,
        meta(s.batch, s.length, s.classes),
        meta(s.batch, s.length, 4),
        meta(targets, dtype=torch.int64),
        meta(targets, 4),
        backward=False,
        peak=VECTOR_PEAK,
    )
    pairs = s.batch * s.length * targets
    return Demand(work.bytes * s.layers, pairs * PAIR_OPERATIONS * s.layers)


def linear_assignment(s: Setting) -> Demand:
    problems = s.layers * s.batch * s.num_groups
    costs = problems * s.targets * s.num_queries
    return Demand(costs * FLOAT32 + problems * s.targets * INT64, 2 * costs)  # one comparison and one choice per cost


def costs_to_host(s: Setting) -> Demand:
    """What a solver on the host needs first: the costs, of all pairs of the batch, through PCIe."""
    costs = s.layers * s.batch * s.length * s.batch * s.targets
    return Demand(costs * FLOAT32, 0, bandwidth=HOST_BANDWIDTH)


def focal_loss(s: Setting) -> Demand:
    """Forward reads the logits; backward reads them and writes their gradients."""
    entries = s.layers * s.batch * s.length * s.classes
    return Demand(3 * entries * FLOAT32, 30 * entries)


def plain_focal_loss(s: Setting) -> Demand:
    shape = s.layers, s.batch * s.length, s.classes

    def loss(logits: Tensor, classes: Tensor) -> Tensor:
        one_hot = torch.zeros_like(logits).scatter(2, classes, 1)
        return torchvision.ops.sigmoid_focal_loss(logits, one_hot, reduction="sum")

    arguments = meta(*shape), meta(*shape[:2], 1, dtype=torch.int64)
    parts = [count(loss, *arguments, backward=backward, peak=VECTOR_PEAK) for backward in (False, True)]
    return Demand(sum(part.bytes for part in parts), focal_loss(s).operations)


# --- ms_deform_attn, one layer of DINO ---

POINTS = 4


def deformable(s: Setting, queries: int, backward: bool) -> Demand:
    """Values, each read once; the gathers of the samples go to the L2 cache."""
    samples = s.batch * queries * s.heads * len(s.maps) * POINTS
    value = s.batch * s.pixels * s.heads * s.channels
    out = s.batch * queries * s.heads * s.channels
    places = samples * 3 * FLOAT32  # x, y and weight
    if backward:  # the gradient of value is summed in float32
        moved = (value + out) * BFLOAT16 + places + value * FLOAT32 + places
        return Demand(moved, samples * (4 * s.channels * 4 + 60))
    return Demand((value + out) * BFLOAT16 + places, samples * (4 * s.channels * 2 + 30))


def plain_deformable(s: Setting, queries: int, backward: bool) -> Demand:
    samples = s.batch, queries, s.heads, len(s.maps), POINTS
    flat = [size for pair in s.maps for size in pair]
    work = count(
        lambda value, locations, weights: ms_deform_attn_reference(value, flat, locations, weights),
        meta(s.batch, s.pixels, s.heads, s.channels, dtype=torch.bfloat16),
        meta(*samples, 2),
        meta(*samples),
        backward=backward,
        peak=VECTOR_PEAK,
    )
    return replace(work, operations=deformable(s, queries, backward).operations)


def gathered(s: Setting, queries: int) -> float:
    """Bytes of the four corners of all samples, in bfloat16."""
    return s.batch * queries * s.heads * len(s.maps) * POINTS * 4 * s.channels * BFLOAT16


def kernels(s: Setting) -> list[KernelOnPaper]:
    """The kernels of a training step of a detector."""
    found = [
        KernelOnPaper("grouped_attention, a layer", lambda s: attention(s, False), lambda s: plain_attention(s, False)),
        KernelOnPaper("its backward", lambda s: attention(s, True), lambda s: plain_attention(s, True)),
        KernelOnPaper("matching_cost, all layers", matching_cost, plain_matching_cost),
        KernelOnPaper("linear_assignment, all layers", linear_assignment, costs_to_host),
        KernelOnPaper("sigmoid_focal_loss and backward, all layers", focal_loss, plain_focal_loss),
    ]
    if s.detector == "Conditional DETR":  # DINO has no dropout
        found[2:2] = [
            KernelOnPaper(
                "grouped_attention with dropout, a layer" if not backward else "its backward",
                lambda s, b=backward: attention(s, b, DROPOUT),
                lambda s, b=backward: plain_attention(s, b, DROPOUT),
            )
            for backward in (False, True)
        ]
    if s.detector == "DINO":
        for name, queries in (("encoder", lambda s: s.pixels), ("decoder", lambda s: s.length)):
            found += [
                KernelOnPaper(
                    f"ms_deform_attn, {name} layer" if not backward else "its backward",
                    lambda s, q=queries, b=backward: deformable(s, q(s), b),
                    lambda s, q=queries, b=backward: plain_deformable(s, q(s), b),
                )
                for backward in (False, True)
            ]
    return found


# --- Tables ---


def megabytes(value: float) -> str:
    return significant(value / 1e6)


def tables() -> str:
    parts = [
        f"Constants: memory {MEMORY_BANDWIDTH / 1e12:g} TB/s (HBM3), {TENSOR_PEAK / 1e12:g} TFLOP/s in bfloat16 on "
        f"dense matrices, {VECTOR_PEAK / 1e12:g} TFLOP/s in float32, L2 cache {L2_BYTES / 1e6:g} MB, PCIe 5 x16 "
        f"{HOST_BANDWIDTH / 1e9:g} GB/s; {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:g} GHz, that is "
        f"{EXPONENTIAL_PEAK / 1e12:.3g} x 10^12 exponentials and {INTEGER_PEAK / 1e12:.3g} x 10^12 integer operations "
        f"a second. Plain PyTorch is {TORCH}. 1 MB = 10^6 bytes."
    ]
    header = ["work", "MB", "GFLOP", "floor, µs", "bound by", "plain PyTorch, MB", "GFLOP", "floor, µs", "times"]
    for s in SETTINGS:
        rows = []
        for kernel in kernels(s):
            own, plain = kernel.own(s), kernel.plain(s)
            row = [
                kernel.name,
                megabytes(own.bytes),
                significant(own.operations / 1e9),
                significant(own.seconds * 1e6),
                own.bound,
            ]
            row += [megabytes(plain.bytes), significant(plain.operations / 1e9), significant(plain.seconds * 1e6)]
            rows.append([*row, significant(plain.seconds / own.seconds)])
        parts += [f"### {s}", table(header, rows)]
    parts += [
        "### Kept for the backward pass",
        table(
            ["setting", "grouped_attention, MB a layer", "explicit mask, MB a layer", "times"],
            [
                [str(s), megabytes(own), megabytes(plain), significant(plain / own)]
                for s, (own, plain) in ((s, kept_for_backward(s)) for s in SETTINGS)
            ],
        ),
        "### What fits into the L2 cache",
        table(
            ["setting", "values of one encoder layer, MB", "gathered by it, MB", "costs of one step, MB"],
            [
                [
                    str(s),
                    megabytes(s.batch * s.pixels * s.heads * s.channels * BFLOAT16) if s.detector == "DINO" else "-",
                    megabytes(gathered(s, s.pixels)) if s.detector == "DINO" else "-",
                    megabytes(linear_assignment(s).bytes),
                ]
                for s in SETTINGS
            ],
        ),
        "### How the floors grow",
        growth(),
    ]
    return "\n\n".join(parts)


def growth() -> str:
    """By what a floor grows when one size doubles: the kernel / plain PyTorch."""
    base = SETTINGS[2]
    doubled = {
        "2 K": replace(base, num_groups=2 * base.num_groups),
        "2 N": replace(base, num_queries=2 * base.num_queries),
        "2 x batch": replace(base, batch=2 * base.batch),
        "2 x image sides": replace(base, scale=2.0),
    }
    rows = []
    for kernel in kernels(base):
        row = [kernel.name]
        for setting in doubled.values():
            factors = (work(setting).seconds / work(base).seconds for work in (kernel.own, kernel.plain))
            row.append(" / ".join(f"{factor:.1f}" for factor in factors))
        rows.append(row)
    return table([f"{base}: kernel / plain", *doubled], rows)


def main() -> None:
    section_command(__doc__, GPU_KERNELS, SECTION, tables)
