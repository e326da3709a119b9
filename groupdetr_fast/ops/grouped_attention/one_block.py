"""When the backward pass of ``grouped_attention`` on a GPU is one kernel (triton_one_block.py), and when it is two.

One kernel has a program for each group of each problem (a head of an image), and takes five products of matrices and
one exponential of each score. Two kernels (triton_kernels.py) take seven and two; each has a program for every 64
queries of a group.
"""

import torch

from ... import _choices
from ...groups import QueryGroups

__all__ = ["MAX_DIM", "MAX_QUERIES", "fits", "serves"]

MAX_DIM = 32
MAX_QUERIES = 320
_QUERIES_OF_A_PROGRAM = 64  # of the two kernels


def serves(
    groups: QueryGroups, dtype: torch.dtype, head_dim: int, value_dim: int, *, problems: int, multiprocessors: int
) -> bool:
    """Whether one kernel serves, on GPUs with tensor cores.

    It does where it can, if the environment variable ``GROUPDETR_FAST_ATTENTION_ONE_BLOCK`` was 1 when the package was
    imported, and if each multiprocessor gets one of its programs: with fewer, the programs of two kernels, of which
    there are more, keep more multiprocessors busy. A group of at most 64 queries has one program either way.
    """
    if _choices.attention_one_block == "never" or not fits(groups, dtype, head_dim, value_dim):
        return False
    programs = problems * groups.num_groups
    many = programs >= multiprocessors or groups.queries_per_group <= _QUERIES_OF_A_PROGRAM
    return many or _choices.attention_one_block == "where it can"


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
