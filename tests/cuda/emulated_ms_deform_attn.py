"""The CUDA kernels of ``ms_deform_attn`` on the CPU, for tensors.

As a script, runs a library over the inputs in a file, both given by their paths, for AddressSanitizer to watch; with
``tiles`` or ``products`` behind them, the library of a kernel on tensor cores. The script does without the package,
since AddressSanitizer does not survive an exception in a library loaded later.
"""

import ctypes
import sys
from pathlib import Path

import torch
from cuda_on_cpu.build import Library, build

BINDING = Path(__file__).with_name("ms_deform_attn_binding.cpp")
TILES_BINDING = Path(__file__).with_name("ms_deform_attn_tiles_binding.cpp")
PRODUCTS_BINDING = Path(__file__).with_name("ms_deform_attn_products_binding.cpp")
CELLS_OF_TILE = 3
MAX_LEVELS = 16
WAYS = ("atomics", "sorted", "in_order")


class Level(ctypes.Structure):
    """``DeformLevel`` of csrc/cuda/ms_deform_attn.cuh."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("height", "width", "start"))


class Problem(ctypes.Structure):
    """``DeformProblem`` of csrc/cuda/ms_deform_attn.cuh."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("images", "pixels", "heads", "channels", "queries", "levels", "points")),
        ("level", Level * MAX_LEVELS),
    )


class EmulatedDeformAttn:
    """``forward`` and ``backward`` are called as the ops are; locations and weights are of the arithmetic's dtype."""

    def __init__(self, library):
        self._library = Library(library)

    def forward(self, value, flat, locations, weights, kernel="forward", **options):
        out = value.new_full((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]), torch.nan)
        self._call(kernel, value, flat, weights, (value, locations, weights, out), options)
        return out

    def forward_products(self, *inputs, **options):
        """The same on tensor cores."""
        return self.forward(*inputs, kernel="forward_products", **options)

    def backward(self, grad, value, flat, locations, weights, way="atomics", shared_sort=False, **options):
        """``way`` is one of :data:`WAYS`, by which the gradient of value is added up."""
        grads = torch.full_like(locations, torch.nan), torch.full_like(weights, torch.nan)
        grad_value = torch.zeros_like(value, dtype=locations.dtype)
        arguments = value, locations, weights, grad, None if way == "in_order" else grad_value, *grads
        scratch = self.scratch_memory(value, flat, weights, shared_sort=shared_sort)
        if way == "sorted":
            self._call("backward_sorted", value, flat, weights, (*arguments, *scratch[:4]), options)
        else:
            self._call("backward", value, flat, weights, arguments, options)
        grad_value = grad_value.to(value.dtype)
        if way == "in_order":
            grad_value = torch.full_like(value, torch.nan)
            arguments = locations, weights, grad, grad_value, *scratch
            self._call("grad_value_in_order", value, flat, weights, arguments, options)
        return grad_value, *grads

    def backward_tiles(self, grad, value, flat, locations, weights, shared_sort=False, **options):
        """The same by tiles, with the gradient of value as it was summed up, in float32."""
        grads = [torch.zeros_like(value, dtype=torch.float32)]
        grads += [torch.full_like(tensor, torch.nan) for tensor in (locations, weights)]
        scratch = self.scratch_memory(value, flat, weights, CELLS_OF_TILE, shared_sort)[:4]
        arguments = value, locations, weights, grad, *grads, *scratch
        self._call("backward_tiles", value, flat, weights, arguments, options)
        return grads

    def scratch_memory(self, value, flat, weights, cells_of_bin=1, shared_sort=False):
        """``DeformScratch``, full of bytes that mean nothing; a sorted sample takes the room of 4 numbers."""
        images, queries, heads, levels, points = weights.shape
        bins = sum((h + 1) * -(-(w + 1) // cells_of_bin) for h, w in zip(flat[::2], flat[1::2], strict=True) if h and w)
        samples = torch.full((images * heads, queries * levels * points, 4), torch.nan, dtype=weights.dtype)
        starts = torch.full((images * heads, bins + 1), -7, dtype=torch.int32)
        offsets = torch.full((self.offsets_size(value, flat, weights),), -7, dtype=torch.int32) if shared_sort else None
        ranks = None if shared_sort else torch.full(weights.shape, -7, dtype=torch.int32)
        return starts, ranks, offsets, samples, samples.clone()

    def offsets_size(self, value, flat, weights):
        return self._library.size("offsets_size", ctypes.byref(problem_of(value, flat, weights)))

    def _call(self, function, value, flat, weights, tensors, options):
        problem = problem_of(value, flat, weights)
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
        name = f"{function}_{value.dtype}".replace("torch.", "")
        self._library.call(name, ctypes.byref(problem), *pointers, **options)


def problem_of(value, flat, weights):
    problem = Problem(*value.shape, weights.shape[1], *weights.shape[3:])
    start = 0
    for level, (h, w) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
        problem.level[level] = Level(h, w, start)
        start += h * w
    return problem


def emulate(checks="races", binding=BINDING, **options):
    return EmulatedDeformAttn(build(binding, checks, **options))


def own_memory(tensor):
    """A copy in a block of memory of its own size, whose ends AddressSanitizer watches."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    if tensor is None:
        return None
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_char * size).from_address(libc.malloc(size))
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def run_tiles(emulated, inputs):
    for value, flat, locations, weights in inputs:
        value, locations, weights = (own_memory(tensor) for tensor in (value, locations, weights))
        grad = own_memory(
            torch.ones(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]).to(value.dtype)
        )
        grads = [own_memory(torch.zeros_like(t, dtype=torch.float32)) for t in (value, locations, weights)]
        for shared_sort in (False, True):
            scratch = emulated.scratch_memory(value, flat, weights, CELLS_OF_TILE, shared_sort)[:4]
            arguments = value, locations, weights, grad, *grads, *map(own_memory, scratch)
            emulated._call("backward_tiles", value, flat, weights, arguments, {})


def run_forward(emulated, inputs, kernel):
    """Returns the inputs and the result, in memory of their own."""
    value, flat, locations, weights = inputs
    value, locations, weights = (own_memory(tensor) for tensor in (value, locations, weights))
    shape = value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]
    out = own_memory(torch.zeros(shape, dtype=value.dtype))
    emulated._call(kernel, value, flat, weights, (value, locations, weights, out), {})
    return value, locations, weights, out


def main():
    emulated = EmulatedDeformAttn(sys.argv[1])
    if sys.argv[3:] == ["tiles"]:
        run_tiles(emulated, torch.load(sys.argv[2]))
        return
    if sys.argv[3:] == ["products"]:
        for inputs in torch.load(sys.argv[2]):
            run_forward(emulated, inputs, "forward_products")
        return
    for inputs in torch.load(sys.argv[2]):
        flat = inputs[1]
        value, locations, weights, out = run_forward(emulated, inputs, "forward")
        grads = [own_memory(torch.zeros_like(t, dtype=locations.dtype)) for t in (value, locations, weights)]
        emulated._call("backward", value, flat, weights, (value, locations, weights, out, *grads), {})
        for shared_sort in (False, True):
            scratch = [own_memory(tensor) for tensor in emulated.scratch_memory(value, flat, weights, 1, shared_sort)]
            sorting = (value, locations, weights, out, *grads, *scratch[:4])
            if value.shape[3] <= 32:  # else the lanes of a warp may not have all channels at once
                emulated._call("backward_sorted", value, flat, weights, sorting, {})
            emulated._call("grad_value_in_order", value, flat, weights, (locations, weights, out, value, *scratch), {})


if __name__ == "__main__":
    main()
