"""The CUDA kernels of ``linear_assignment`` on the CPU, for NumPy arrays.

As a script, runs a library given by its path over problems of many sizes, for AddressSanitizer to watch.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from cuda_on_cpu.build import Library, build

BINDING = Path(__file__).with_name("linear_assignment_binding.cpp")
MAX_LEADING_DIMS = 8


class Batch(ctypes.Structure):
    """``AssignmentBatch`` of csrc/cuda/linear_assignment.cuh."""

    _fields_ = (
        ("problems", ctypes.c_int32),
        ("targets", ctypes.c_int32),
        ("queries", ctypes.c_int32),
        ("leading_dims", ctypes.c_int32),
        ("target_stride", ctypes.c_int64),
        ("leading_sizes", ctypes.c_int32 * MAX_LEADING_DIMS),
        ("cost_strides", ctypes.c_int64 * MAX_LEADING_DIMS),
        ("num_targets_strides", ctypes.c_int64 * MAX_LEADING_DIMS),
    )


class EmulatedLinearAssignment:
    """Callable as the op is: ``cost`` [..., T, N] with contiguous queries and ``num_targets`` [...]."""

    def __init__(self, library):
        self._library = Library(library)

    def __call__(self, cost, num_targets, **options):
        *leading, targets, queries = cost.shape
        batch = Batch(num_targets.size, targets, queries, len(leading), cost.strides[-2] // cost.itemsize)
        for dim, size in enumerate(leading):
            batch.leading_sizes[dim] = size
            batch.cost_strides[dim] = cost.strides[dim] // cost.itemsize
            batch.num_targets_strides[dim] = num_targets.strides[dim] // num_targets.itemsize
        result = np.full(cost.shape[:-1], -7)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (cost, num_targets, result)]
        self._library.call(f"linear_assignment_{cost.dtype}", ctypes.byref(batch), *pointers, **options)
        return result


def emulate(checks="races", **options):
    return EmulatedLinearAssignment(build(BINDING, checks, **options))


def crowd(random, *shape):
    """Costs for which every target wants the same queries, so that long augmenting paths arise."""
    return random.random(shape[-1]) * 10 + random.random(shape) * 0.01


def main():
    solve = EmulatedLinearAssignment(sys.argv[1])
    random = np.random.default_rng(0)
    for shape in [(1, 1, 1), (3, 5, 33), (2, 17, 6), (2, 35, 40), (2, 3, 0), (1, 9, 1030), (1, 34, 1025), (1, 33, 7)]:
        for dtype in (np.float32, np.float64) if len(sys.argv) == 2 else (np.float32,):
            cost = random.standard_normal(shape).astype(dtype)
            num_targets = random.integers(0, shape[-2] + 3, shape[0])
            num_targets[0] = shape[-2]
            solve(cost, num_targets)
            cost[random.random(shape) < 0.3] = np.nan
            solve(cost, num_targets)


if __name__ == "__main__":
    main()
