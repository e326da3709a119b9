"""The op ``linear_assignment``: minimum-cost matching of targets to queries, many problems at once."""

import torch
from torch import Tensor

from ..._library import define_op
from .reference import linear_assignment_reference

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear_assignment(cost: Tensor, num_targets: Tensor) -> Tensor:
    """Assign a query of its own to every target so that the total cost is smallest, for each problem of a batch.

    This is the one-to-one assignment of DETR and, per group of queries, of Group DETR (equations 2 and 3 of the
    paper). The kernels find shortest augmenting paths (Crouse 2016, "On implementing 2D rectangular assignment
    algorithms") and sum in float64, so that the total is the smallest up to rounding in float64. GPUs with slow doubles
    sum float32 costs in integers where that makes no difference. GPUs copy the costs to shared memory where they fit
    (docs/gpu_kernels.md); ``GROUPDETR_FAST_ASSIGNMENT_SHARED_COSTS=0`` in the environment, when the package is
    imported, turns that off.

    Args:
        cost: ``[..., T_max, N]``, the cost of each target (row) with each query (column); float32 or float64, or
            float16 or bfloat16, which are converted to float32. Only the last dimension has to be contiguous to avoid
            a copy: for costs ``[L, B, T_max, K * N]`` of K groups pass
            ``cost.unflatten(-1, (K, N)).transpose(-2, -3)``, a view ``[L, B, K, T_max, N]``.
        num_targets: int64 on the device of ``cost``, of a shape that broadcasts to the leading shape ``[...]``: how
            many of the ``T_max`` rows are targets. The rows after them are padding and are not read. Values outside
            ``[0, T_max]`` are clamped to it.

    Returns:
        ``[..., T_max]`` int64, the query of each target; -1 on padding. With fewer queries than targets every query is
        used, and the targets left over get -1.

    NaN, infinities and magnitudes above 1e30 (float32) or 1e300 (float64, 1e30 after a conversion to float32) mark
    pairs to avoid. They count as one cost, ``max + (min(T, N) + 1) * (max - min)`` over the other entries of the
    problem, so that as few of these pairs as possible are used and the other targets still get their optimal queries.
    Where all entries are such, the assignment is an arbitrary valid one.

    The result is deterministic: it depends neither on the number of threads nor on the instruction set. Ties are broken
    by fixed rules (the first of a target's equally cheap queries, a free query before one that is taken), but another
    device or the reference may choose another assignment of the same cost. The result has no gradient.

    Raises:
        TypeError: if ``cost`` is not floating point or ``num_targets`` is not int64.
        ValueError: if a shape or a device does not fit.
    """
    if cost.dtype not in _DTYPES:
        raise TypeError(f"cost must be float32, float64, float16 or bfloat16, got {cost.dtype}")
    if not isinstance(num_targets, Tensor) or num_targets.dtype != torch.int64:
        found = num_targets.dtype if isinstance(num_targets, Tensor) else f"no tensor: {num_targets!r}"
        raise TypeError(f"num_targets must be int64, got {found}")
    if cost.dim() < 2:
        raise ValueError(f"cost must have shape [..., T_max, N], got {list(cost.shape)}")
    if num_targets.device != cost.device:
        raise ValueError(f"num_targets must lie on the device of cost, {cost.device}, got {num_targets.device}")
    leading = cost.shape[:-2]
    if num_targets.shape != leading:
        if not _broadcasts(num_targets.shape, leading):
            shapes = f"{list(leading)} of cost, got {list(num_targets.shape)}"
            raise ValueError(f"num_targets must broadcast to the leading shape {shapes}")
        num_targets = num_targets.expand(leading)
    if cost.dtype in (torch.float16, torch.bfloat16):
        cost = cost.float()
    return _op(cost.detach(), num_targets)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    own = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in zip(shape, own, strict=True))


def _without_kernel(cost: Tensor, num_targets: Tensor) -> Tensor:
    """On a device without a kernel: the CPU's, as the reference would take a loop of many steps for every target."""
    if cost.device.type == "cpu":
        return linear_assignment_reference(cost, num_targets)
    return torch.ops.groupdetr_fast.linear_assignment(cost.cpu(), num_targets.cpu()).to(cost.device)


def _fake(cost: Tensor, num_targets: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


define_op(
    "linear_assignment(Tensor cost, Tensor num_targets) -> Tensor",
    reference=_without_kernel,
    fake=_fake,
    public=True,
    called_by_kernels=True,
    way="on the CPU",
)
_op = torch.ops.groupdetr_fast.linear_assignment.default
