"""When the backward pass of ``grouped_attention`` on a GPU is one kernel (triton_one_block.py), and when it is two.

One kernel has a program for each group of each problem (a head of an image), and takes five products of matrices and
one exponential of each score. Two kernels (triton_kernels.py) take seven and two; each has a program for every 64
queries of a group, and for every 16 of a group of at most 32.
"""

from typing import NamedTuple

import torch

from ... import _choices
from ...groups import QueryGroups

__all__ = ["MAX_DIM", "MAX_QUERIES", "Gpu", "fits", "serves"]

MAX_DIM = 32
MAX_QUERIES = 320


class Gpu(NamedTuple):
    """What the rule asks of a GPU."""

    multiprocessors: int
    capability: tuple[int, int]


def serves(groups: QueryGroups, dtype: torch.dtype, head_dim: int, value_dim: int, *, problems: int, gpu: Gpu) -> bool:
    """Whether one kernel serves, on GPUs with tensor cores.

    It does where it can, if the environment variable ``GROUPDETR_FAST_ATTENTION_ONE_BLOCK`` was 1 when the package was
    imported, and:

    - Each multiprocessor gets one of its programs: with fewer, the programs of two kernels, of which there are more,
      keep more multiprocessors busy. A group of which these make one program has one either way.
    - Not on compute capability 10.x. Products go through a memory of their own there, and the longest loop for groups
      of 300 has 716 instructions, 392 on 9.0; those of the two kernels were not counted, and no GPU has timed either.
    """
    if _choices.attention_one_block == "never" or not fits(groups, dtype, head_dim, value_dim):
        return False
    enough = problems * groups.num_groups >= gpu.multiprocessors
    pays = enough or _is_one_program_of_two_kernels(groups.queries_per_group)
    return (pays and gpu.capability[0] != 10) or _choices.attention_one_block == "where it can"


def _is_one_program_of_two_kernels(queries_per_group: int) -> bool:
    """Whether a group is one program of each of the two kernels."""
    return queries_per_group <= 16 or 32 < queries_per_group <= 64


def fits(groups: QueryGroups, dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether one kernel can do it.

    - Half types and heads of at most 32 channels: a thread has 255 registers, of which the gradients of 192 keys and
      values take 96. Those of wider heads take more, and so do operands in float32.
    - At most 320 queries a group, in two passes along its queries. Every pass is code of its own.
    - No denoising queries. These see the keys of two segments, and the keys of a group are seen from several: no
      program could alone have all that adds to a gradient.
    """
    return (
        dtype in (torch.float16, torch.bfloat16)
        and min(head_dim, value_dim) >= 1
        and max(head_dim, value_dim) <= MAX_DIM
        and groups.queries_per_group <= MAX_QUERIES
        and groups.denoising_length == 0
    )
