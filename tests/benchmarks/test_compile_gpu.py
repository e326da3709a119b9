"""GPU kernels are compiled here, without a GPU: none spills, all fit the architectures."""

import csv
import importlib

import pytest

from gpu import compilation, compile_gpu
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


def assert_no_problems(all_compiled):
    usages = [usage for compiled in all_compiled for usage in compiled.usages.values()]
    problems = [problem for usage in usages for problem in usage.problems()]
    assert not problems, "\n".join(problems)
    assert usages
    assert all(usage.registers > 0 for usage in usages)


def test_every_kernel_has_cases_of_its_own_names(cases):
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    files = compilation.ROOT.glob("groupdetr_fast/ops/*/triton_*.py")
    modules = [importlib.import_module(f"groupdetr_fast.ops.{file.parent.name}.{file.stem}") for file in files]
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
    assert_no_problems([compilation.compile_cuda(source, architecture)])


def test_tasks_are_all_configurations_and_sources(cases):
    found = compilation.tasks("", [80, 90])
    of_each = len(compilation.triton_cases(80)) + len(compilation.cuda_sources())
    assert len(found) == len(set(found)) == 2 * of_each
    (task,) = compilation.tasks("ms_deform_attn", [80])
    assert task.architecture == 80
    assert task.source.name == "ms_deform_attn.cu"


def test_tasks_of_some_kernels(cases):
    (task,) = compilation.tasks(r"deform_backward<bfloat16, \d>", [90])
    assert task.source.name == "ms_deform_attn.cu"
    found = compilation.tasks("^(matching_cost|linear_assignment/solve)", [90])
    assert {task.case.split("/")[0] for task in found if task.case} == {"matching_cost"}
    assert [task.source.name for task in found if task.source] == ["linear_assignment.cu"]
    assert compilation.tasks("no such kernel", [90]) == []


def test_a_task_compiles_its_configuration_once_for_both_tables(cases, monkeypatch):
    task = next(task for task in compilation.tasks("sigmoid_focal_loss", [90]) if task.case)
    calls = []
    compile_triton = compilation.compile_triton
    monkeypatch.setattr(compilation, "compile_triton", lambda *args: calls.append(args) or compile_triton(*args))
    measured = compile_gpu.measure(task)
    assert len(calls) == 1
    (usage,), (loop,) = measured
    assert usage.kernel == loop.kernel == task.case
    assert usage.architecture == loop.architecture == 90
    assert (loop.threads, loop.registers) == (usage.threads, usage.registers)
    assert loop.blocks > 0


def test_a_kernel_that_spills_is_found(cases):
    case = next(case for case in cases if case.name.startswith("matching_cost/fp64"))
    (usage,) = compilation.compile_triton(case._replace(num_warps=1), 90).usages.values()
    (problem,) = usage.problems()
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
    case = compilation.triton_cases()[0].name
    usages = [FINE._replace(kernel=case), FINE._replace(kernel=f"{case}-other", threads=None)]
    header, first, second = compile_gpu.table(Usage._fields, usages).splitlines()
    assert len(header) == len(first) == len(second)
    assert first.split() == [case, "90", "128", "64", "1024", "0", "0"]
    compile_gpu.update(tmp_path / "folder" / "usage.csv", Usage._fields, usages, [])
    with (tmp_path / "folder" / "usage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == [case, f"{case}-other"]
    assert [row["threads"] for row in rows] == ["128", ""]


def test_a_table_keeps_what_was_not_compiled_and_still_is_there(tmp_path):
    table = tmp_path / "usage.csv"
    one, other = [case.name for case in compilation.triton_cases()][:2]
    cuda = ["linear_assignment/gone<float>", "ms_deform_attn/kept<float>", "no_such_op/kernel", "no_such_op/fwd/half"]
    compile_gpu.update(table, Usage._fields, [FINE._replace(kernel=name) for name in (one, other, *cuda)], [])

    new = FINE._replace(kernel="linear_assignment/new<float>")
    source = next(source for source in compilation.cuda_sources() if source.stem == "linear_assignment")
    work = [compilation.Task(90, source=source), compilation.Task(90, case=one)]
    compile_gpu.update(table, Usage._fields, [FINE._replace(kernel=one, registers=1), new], work)
    registers = {row["kernel"]: int(row["registers"]) for row in compile_gpu.read(table)}
    assert registers == {one: 1, other: 64, new.kernel: 64, "ms_deform_attn/kept<float>": 64}

    compile_gpu.update(table, Usage._fields, [], [compilation.Task(80, source=source)])
    assert new.kernel in {row["kernel"] for row in compile_gpu.read(table)}


@pytest.mark.parametrize("command", ["compile_gpu", "inner_loops"])
@pytest.mark.parametrize(
    ("only", "message"),
    [("no such kernel", "no kernel has no such kernel in its name"), ("a(", "no regular expression")],
)
def test_a_name_that_no_kernel_has_ends_the_command(command, only, message, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(compile_gpu, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", only])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"gpu.{command}").main()
    assert message in f"{ended.value} {capsys.readouterr().err}"
