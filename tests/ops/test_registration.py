"""Which kernel runs where: at most one owner per (op, dispatch key), asked from the dispatcher."""

import importlib.util
import re

import pytest
import torch

from groupdetr_fast import ops

# The file whose kernel runs on the CPU; kernels registered in Python are reported under _library.py.
CPU_OWNERS = {
    "attention_dropout": "attention_dropout.cpp",
    "cross_attention": "_library.py",
    "cross_attention_backward": "_library.py",
    "grouped_attention": "_library.py",
    "grouped_attention_backward": "_library.py",
    "linear_assignment": "linear_assignment.cpp",
    "matching_cost": "matching_cost.cpp",
    "ms_deform_attn": "ms_deform_attn.cpp",
    "ms_deform_attn_backward": "ms_deform_attn.cpp",
    "sigmoid_focal_loss": "sigmoid_focal_loss.cpp",
    "sigmoid_focal_loss_backward": "sigmoid_focal_loss.cpp",
}
# References that a compiled CUDA kernel calls on a GPU that it has no code for.
CALLED_BY_KERNELS = {"linear_assignment_reference", "ms_deform_attn_backward_reference", "ms_deform_attn_reference"}
# Public ops whose CUDA kernel is in Triton, where that is installed.
TRITON_OWNERS = {"cross_attention", "grouped_attention", "matching_cost", "sigmoid_focal_loss"}
# Ops with an Autograd kernel: the differentiable ones, and their backward ops, where it blocks double backward.
WITH_AUTOGRAD = {
    "cross_attention",
    "cross_attention_backward",
    "grouped_attention",
    "grouped_attention_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_backward",
}


def _owners(op):
    """{dispatch key: file} of an op's kernels, for keys as the dispatcher writes them."""
    dump = torch._C._dispatch_dump(f"groupdetr_fast::{op}")
    return dict(re.findall(r"^((?!debug)\w+(?:\[alias\])?): registered at \S*?([\w.]+):\d+", dump, re.MULTILINE))


def test_owner_table_lists_every_op():
    names = torch._C._dispatch_get_all_op_names()
    found = {name.split("::")[1] for name in names if name.startswith("groupdetr_fast::")}
    assert found == set(CPU_OWNERS) | CALLED_BY_KERNELS


@pytest.mark.parametrize("op", sorted(CALLED_BY_KERNELS))
def test_references_that_kernels_call_have_no_kernels(op):
    assert _owners(op) == {"CompositeExplicitAutograd[alias]": "_library.py"}


@pytest.mark.parametrize("op", CPU_OWNERS)
def test_owners(op):
    owners = _owners(op)
    expected = {"CPU", "Meta", "CompositeExplicitAutograd[alias]"}
    if op in WITH_AUTOGRAD:
        expected.add("Autograd[alias]")
    assert set(owners) - {"CUDA"} == expected
    assert owners["CPU"] == CPU_OWNERS[op]
    assert owners["CompositeExplicitAutograd[alias]"] == "_library.py"


def test_backends():
    backends = ops.backends(ask_gpu=False)
    assert set(backends) == {name for name in CPU_OWNERS if hasattr(ops, name)}
    assert {op: kinds["cpu"] for op, kinds in backends.items()} == {
        "cross_attention": "PyTorch",
        "grouped_attention": "PyTorch",
        "linear_assignment": "C++",
        "matching_cost": "C++",
        "ms_deform_attn": "C++",
        "sigmoid_focal_loss": "C++",
    }
    in_triton = {op for op, kinds in backends.items() if kinds["cuda"] == "Triton"}
    assert in_triton == (TRITON_OWNERS if importlib.util.find_spec("triton") else set())
    for op, kinds in backends.items():
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"groupdetr_fast::{op}", "CUDA")
        assert (kinds["cuda"] == "reference") is not has_kernel
