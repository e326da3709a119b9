"""What the launchers of both attentions share: tiles, how products are computed, and what kernels are compiled with."""

from typing import NamedTuple

import torch
import triton

from ._attention import MAX_DIM

__all__ = ["DTYPES", "MAX_DIM", "Tile", "constexprs_of", "precision_of", "width_of"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """Rows that a program owns, rows that it meets at a time, warps of a program, and stages of its loads."""

    block: int
    step: int
    num_warps: int
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """What Triton is told besides the arguments of a kernel."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def precision_of(dtype: torch.dtype, head_dim: int, value_dim: int, tensor_cores: bool = True) -> str:
    """How products are computed, by which tiles are chosen.

    Products of float32 are those of TF32 where torch may use that for matrices. Otherwise three products of TF32 stand
    for one: nearly as precise, and on tensor cores. They split each factor in two, which with wide heads does not fit
    the registers; there, products are those of float32. So are all products, of half types too, on GPUs whose tensor
    cores Triton does not use.
    """
    if not tensor_cores:
        return "fma"
    if dtype != torch.float32:
        return "half"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if max(head_dim, value_dim) <= 32 else "ieee"


def width_of(head_dim: int, value_dim: int) -> int:
    """The width of the widest head, as tiles are listed by it."""
    return max(32, _block_dim(head_dim), _block_dim(value_dim))


def constexprs_of(precision: str, head_dim: int, value_dim: int, tile: Tile) -> dict[str, int | str]:
    """Arguments that the kernels are compiled with."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": _block_dim(head_dim),
        "BLOCK_DV": _block_dim(value_dim),
        "BLOCK": tile.block,
        "STEP": tile.step,
        "PRECISION": precision if precision.startswith("tf32") else "ieee",  # of no meaning to half types
    }


def _block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))  # 16: the least that tensor cores multiply
