"""GPU kernels are compiled here, without a GPU: none spills, all fit the architectures."""

import csv
import importlib

import pytest

from gpu import compilation
from gpu.compilation import SHARED_MEMORY, Usage

FINE = Usage("op/kernel", 90, 128, 64, 1024, 0, 0)


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("triton")
    return compilation.triton_cases()


def first_of_each_kernel(cases):
    return list({case.kernel.__name__: case for case in reversed(cases)}.values())


def is_for_tensor_cores_alone(case):
    return case.name.startswith("cross_attention/")


def assert_no_problems(usages):
    problems = [problem for usage in usages for problem in usage.problems()]
    assert not problems, "\n".join(problems)
    assert all(usage.registers > 0 for usage in usages)


def test_every_kernel_has_cases_of_its_own_names(cases):
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    files = compilation.ROOT.glob("groupdetr_fast/ops/*/triton_kernels.py")
    modules = [importlib.import_module(f"groupdetr_fast.ops.{file.parent.name}.triton_kernels") for file in files]
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {case.kernel.__name__ for case in cases} == defined
    for case in cases:
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert list(case.signature) == case.kernel.arg_names
        assert constants == set(case.constexprs)


@pytest.mark.parametrize("architecture", [75, 90])
def test_triton_kernels(cases, architecture):
    """One configuration of each, with tensor cores and without; all of them are slow."""
    some = first_of_each_kernel(compilation.triton_cases(architecture))
    kernels = {case.kernel.__name__ for case in cases if architecture >= 80 or not is_for_tensor_cores_alone(case)}
    assert {case.kernel.__name__ for case in some} == kernels
    assert_no_problems([compilation.compile_triton(case, architecture) for case in some])


def test_what_an_architecture_has_no_use_for_is_not_compiled(cases):
    """Tiles for tensor cores are those of compute capability 8.0 and later, and the others have their own."""
    old, new = ({case.name for case in compilation.triton_cases(architecture)} for architecture in (75, 80))
    alone = {case.name for case in cases if is_for_tensor_cores_alone(case)}
    assert alone <= new - old
    assert {name.split("/")[2].split("-")[0] for name in old - new} == {"fma"}
    assert {name.split("/")[2].split("-")[0] for name in new - old - alone} == {"half", "tf32", "tf32x3", "ieee"}
    assert old | new == {case.name for case in cases}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_all_triton_kernels(architecture):
    pytest.importorskip("triton")
    assert_no_problems(
        [compilation.compile_triton(case, architecture) for case in compilation.triton_cases(architecture)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("source", compilation.cuda_sources(), ids=lambda source: source.stem)
def test_cuda_kernels(source, architecture):
    if compilation.find_nvcc() is None:
        pytest.skip("nvcc was not found (set CUDA_HOME)")
    if not compilation.knows(compilation.find_nvcc(), architecture):
        pytest.skip(f"this nvcc does not compile for sm_{architecture}")
    usages = compilation.compile_cuda(source, architecture)
    assert usages
    assert_no_problems(usages)


def test_tasks_are_all_configurations_and_sources(cases):
    found = compilation.tasks("", [80, 90])
    of_each = len(compilation.triton_cases(80)) + len(compilation.cuda_sources())
    assert len(found) == len(set(found)) == 2 * of_each
    (task,) = compilation.tasks("ms_deform_attn", [80])
    assert task.architecture == 80
    assert task.source.name == "ms_deform_attn.cu"


def test_a_task_compiles_its_configuration(cases):
    task = next(task for task in compilation.tasks("sigmoid_focal_loss", [90]) if task.case)
    (usage,) = task.compile()
    assert usage.kernel == task.case
    assert usage.architecture == 90


def test_a_kernel_that_spills_is_found(cases):
    case = next(case for case in cases if case.name.startswith("matching_cost/fp64"))
    (problem,) = compilation.compile_triton(case._replace(num_warps=1), 90).problems()
    assert "spills" in problem


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spills": 8, "stack": 16}, "spills 8 bytes and has a stack of 16 bytes"),
        ({"shared_memory": 228 << 10}, "needs 233472 bytes of shared memory of 232448"),
        ({"registers": 168, "threads": 256}, "has 168 registers in 256 threads: 2 blocks do not fit"),
    ],
)
def test_problems(change, text):
    assert FINE.problems() == []
    assert FINE._replace(**change).problems() == [f"op/kernel for sm_90 {text}"]
    assert FINE._replace(threads=None, registers=255).problems() == []


def test_table_and_file(tmp_path):
    usages = [FINE, FINE._replace(kernel="op/other_kernel", threads=None)]
    header, first, second = compilation.table(usages).splitlines()
    assert len(header) == len(first) == len(second)
    assert first.split() == ["op/kernel", "90", "128", "64", "1024", "0", "0"]
    compilation.write(usages, tmp_path / "folder" / "usage.csv")
    with (tmp_path / "folder" / "usage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == ["op/kernel", "op/other_kernel"]
    assert [row["threads"] for row in rows] == ["128", ""]
