"""Dropout by a counter-based generator, so that backward repeats it without storing a mask: of attention probabilities,
and on CPUs of anything else, since torch draws its numbers one after another there.

Whether the probability of (image b, head h, query row, key column) is kept depends on these and the seed alone, by
32-bit integer arithmetic (all sums and products modulo 2**32)::

    word(x)      = x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0xD35A2D97;  x ^= x >> 15
    head_word0   = word(word(word(seed_low) ^ seed_high) ^ head)                      head = b * H + h
    head_word1   = word(word(word(seed_high + 0x9E3779B9) ^ seed_low) ^ head)
    slope        = word(head_word0 ^ row)
    offset       = word(head_word1 ^ row)
    point        = (place * place) ^ place               place = column * 0x9E3779B9 + head_word0
    keep         = slope * point + offset >= floor(p * 2**32)

A hash of every probability would be most of the work of a GPU. Here heads, rows and columns are hashed, and a pair of
row and column costs one multiply-add and one comparison: each row is a random line modulo 2**32, taken at points that
the columns of a head share. Over random slopes and offsets, the values at two different points are as good as
independent, and so are the four of any two rows and two columns.

What no line hides is a small combination of points that vanishes, such as point1 - point2 - point3 + point4 = 0: it
would tie these columns together in every row of the head. Points must therefore be far from linear in the column, and
from any low degree; hence the xor with a square, whose own third differences are 0 too often. Some 40 of the 8e10 such
sets among 900 columns satisfy that equation, as of random even numbers, and others in every head of every call.

``word`` is a bijection of 32-bit numbers with little bias (the constants are those of the hash-prospector project's
"lowbias32"). Two words per row make it unlikely that two rows, which run through the same points, share a pattern. The
C++ and GPU kernels follow this definition bit for bit; row and column count along the full sequence of L queries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._library import define_op, has_kernel

__all__ = ["attention_dropout_reference", "dropout", "is_fast_on", "keep_mask", "new_seed"]

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def new_seed(device: torch.device) -> Tensor:
    """``[1]`` int64 drawn from torch's default generator of the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, p: float, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Which probabilities are kept.

    Args:
        seed: ``[1]`` int64.
        p: probability to drop one, in [0, 1).
        head: int64, ``b * H + h``.
        row: int64, query in the sequence.
        column: int64, key in the sequence; head, row and column broadcast against each other.

    Returns:
        bool of the broadcast shape.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    head_word0 = _word(_word(_word(low) ^ high) ^ head)
    head_word1 = _word(_word(_word((high + _GOLDEN) & _MASK) ^ low) ^ head)
    slope, offset = _word(head_word0 ^ row), _word(head_word1 ^ row)
    place = (column * _GOLDEN + head_word0) & _MASK
    point = (place * place) ^ place
    # int64 products overflow, here and below, but their low 32 bits are right.
    return (slope * (point & _MASK) + offset) & _MASK >= int(p * 2**32)


def _word(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0xD35A2D97) & _MASK
    return x ^ (x >> 15)


def attention_dropout_reference(probabilities: Tensor, seed: Tensor, p: float, origins: list[int]) -> Tensor:
    """Drop probabilities of blocks of the attention matrix, and scale those that are kept by ``1 / (1 - p)``.

    Args:
        probabilities: ``[blocks, H, R, C]``, float32 or float64: all heads of some blocks.
        seed: ``[1]`` int64.
        p: probability to drop one, in [0, 1).
        origins: ``image, first row, first column`` of each block, flattened.
    """
    blocks, heads, rows, columns = probabilities.shape
    device = probabilities.device
    image, row, column = torch.tensor(origins, dtype=torch.int64, device=device).view(blocks, 3, 1, 1, 1).unbind(1)
    keep = keep_mask(
        seed,
        p,
        image * heads + torch.arange(heads, device=device)[:, None, None],
        row + torch.arange(rows, device=device)[:, None],
        column + torch.arange(columns, device=device),
    )
    return torch.where(keep, probabilities * (1 / (1 - p)), 0.0).contiguous()


class _Dropout(torch.autograd.Function):
    """Linear in ``x``, so that its gradient is itself."""

    @staticmethod
    def forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
        rows = x.reshape(1, 1, x.shape[:-1].numel(), x.shape[-1])
        return torch.ops.groupdetr_fast.attention_dropout(rows, seed, p, [0, 0, 0]).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
        _, ctx.p, seed = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(grad, ctx.p, seed), None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of ``x`` ``[..., C]``, by the above where that is faster: on CPUs, in float32 and float64."""
    if 0 < p < 1 and x.dtype in (torch.float32, torch.float64) and is_fast_on(x):
        return _Dropout.apply(x, p, new_seed(x.device))
    return F.dropout(x, p)


def is_fast_on(x: Tensor) -> bool:
    """Whether the device of ``x`` has a kernel that drops faster than torch's, and no compiler will write one."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and has_kernel("attention_dropout", "CPU")


def _fake(probabilities: Tensor, seed: Tensor, p: float, origins: list[int]) -> Tensor:
    return probabilities.new_empty(probabilities.shape)


define_op(
    "attention_dropout(Tensor probabilities, Tensor seed, float p, int[] origins) -> Tensor",
    reference=attention_dropout_reference,
    fake=_fake,
)
