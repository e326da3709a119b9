"""The CUDA kernels of ``linear_assignment`` on the CPU, for NumPy arrays.

As a script, runs a library given by its path over problems of many sizes, for AddressSanitizer to watch.
"""

import ctypes
import itertools
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


class Device(ctypes.Structure):
    """``AssignmentDevice`` of csrc/cuda/linear_assignment.cuh."""

    _fields_ = (
        ("multiprocessors", ctypes.c_int32),
        ("threads_of_multiprocessor", ctypes.c_int32),
        ("shared_of_multiprocessor", ctypes.c_size_t),
        ("shared_of_block", ctypes.c_size_t),
        ("slow_doubles", ctypes.c_bool),
    )


class Plan(ctypes.Structure):
    """``AssignmentPlan`` of csrc/cuda/linear_assignment.cuh."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("search_threads", ctypes.c_int32),
        ("workspace_bytes", ctypes.c_size_t),
        ("in_shared_memory", ctypes.c_bool),
        ("fixed_point", ctypes.c_bool),
        ("shared_costs", ctypes.c_bool),
        ("dynamic_bytes", ctypes.c_size_t),
    )


H200 = (132, 2048, 228 << 10, 227 << 10)
RTX_4090 = (128, 1536, 100 << 10, 99 << 10)
T4 = (40, 1024, 64 << 10, 64 << 10)


class EmulatedLinearAssignment:
    """Callable as the op is: ``cost`` [..., T, N] with contiguous queries and ``num_targets`` [...]."""

    def __init__(self, library):
        self._library = Library(library)

    def __call__(self, cost, num_targets, *, shared_costs=False, fixed_point=False, **options):
        *leading, targets, queries = cost.shape
        batch = Batch(num_targets.size, targets, queries, len(leading), cost.strides[-2] // cost.itemsize)
        for dim, size in enumerate(leading):
            batch.leading_sizes[dim] = size
            batch.cost_strides[dim] = cost.strides[dim] // cost.itemsize
            batch.num_targets_strides[dim] = num_targets.strides[dim] // num_targets.itemsize
        result = np.full(cost.shape[:-1], -7)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (cost, num_targets, result)]
        device = ctypes.byref(Device(*H200, fixed_point))
        function = f"linear_assignment_{cost.dtype}"
        self._library.call(function, ctypes.byref(batch), device, shared_costs, *pointers, **options)
        return result

    def plan(self, problems, targets, queries, device=H200, *, dtype="float32", shared_costs=True, slow_doubles=False):
        batch, plan = Batch(problems, targets, queries), Plan()
        device = Device(*device, slow_doubles)
        self._library.call(f"plan_{dtype}", *map(ctypes.byref, (batch, device)), shared_costs, ctypes.byref(plan))
        return plan


def emulate(checks="races", **options):
    return EmulatedLinearAssignment(build(BINDING, checks, **options))


def crowd(random, *shape):
    """Costs for which every target wants the same queries, so that long augmenting paths arise."""
    return random.random(shape[-1]) * 10 + random.random(shape) * 0.01


def main():
    solve = EmulatedLinearAssignment(sys.argv[1])
    random = np.random.default_rng(0)
    shapes = [(1, 1, 1), (3, 5, 33), (2, 17, 6), (2, 35, 40), (2, 3, 0), (1, 9, 1030), (1, 34, 1025), (1, 33, 7)]
    dtypes = (np.float32, np.float64) if len(sys.argv) == 2 else (np.float32,)
    for shape, dtype, shared_costs in itertools.product(shapes, dtypes, (False, True)):
        way = {"shared_costs": shared_costs, "fixed_point": shared_costs}
        cost = random.standard_normal(shape).astype(dtype)
        num_targets = random.integers(0, shape[-2] + 3, shape[0])
        num_targets[0] = shape[-2]
        solve(cost, num_targets, **way)
        cost[random.random(shape) < 0.3] = np.nan
        solve(cost, num_targets, **way)


if __name__ == "__main__":
    main()
