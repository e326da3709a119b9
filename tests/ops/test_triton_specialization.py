"""Triton compiles a kernel for each kind of number (1, multiples of 16, others): not for numbers of the batch."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

# Parameters of each op's kernels that change from batch to batch, with the objects of its images.
OF_THE_BATCH = {
    "cross_attention": ["queries", "keys", "queries_per_chunk", "num_parts"],
    "grouped_attention": ["length", "denoising_sets", "denoising_groups", "queries_per_denoising_group"],
    "matching_cost": ["images", "max_targets"],
    "sigmoid_focal_loss": ["queries"],
}


def cases():
    """One configuration of each kernel, by its name."""
    modules = [importlib.import_module(f"groupdetr_fast.ops.{op}.triton_cases") for op in OF_THE_BATCH]
    return {case.kernel.__name__.strip("_"): case for module in modules for case in module.compile_cases()}


def compiled_for(case, **numbers):
    """What Triton looks a launch up by in the kernels that it has compiled."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(case.kernel.signature, case.kernel.params, backend)
    tensor = torch.zeros(16)
    arguments = {name: tensor if type_[0] == "*" else 7 for name, type_ in case.signature.items()}
    _, kinds, _ = bind(**arguments | case.constexprs | numbers)
    return str(kinds)


@pytest.mark.parametrize("kernel", cases())
def test_numbers_of_the_batch_do_not_compile_again(kernel):
    case = cases()[kernel]
    for name in OF_THE_BATCH[case.name.partition("/")[0]]:
        if name not in case.signature:
            continue
        assert len({compiled_for(case, **{name: number}) for number in (1, 15, 16, 17, 48)}) == 1, name


def test_other_numbers_do():
    """Else the test above would prove nothing."""
    case = cases()["matching_cost_kernel"]
    assert len({compiled_for(case, classes=number) for number in (1, 15, 16)}) == 3


@triton.jit(do_not_specialize=["layout"])
def _takes_a_tuple(layout):
    pass


def test_a_tuple_is_compiled_again_for_other_numbers():
    """Which is why kernels take the numbers of a layout one by one."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(_takes_a_tuple.signature, _takes_a_tuple.params, backend)
    assert len({str(bind(layout)[1]) for layout in ((1, 3), (16, 3), (7, 3))}) == 3
