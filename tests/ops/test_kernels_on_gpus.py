"""Which GPUs the kernels serve, what serves instead, and what users are told. No GPU is needed: they are made up."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import groupdetr_fast._library as library
from groupdetr_fast import _gpus as gpus
from groupdetr_fast import cli, ops
from groupdetr_fast.integrations import kernels
from groupdetr_fast.integrations.kernels import has_kernel, serves_everywhere
from groupdetr_fast.ops import _triton
from groupdetr_fast.ops.cross_attention import op as cross_attention
from groupdetr_fast.ops.linear_assignment.reference import linear_assignment_reference
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference
from groupdetr_fast.ops.serving import kinds_of
from groupdetr_fast.testing import assignment_way, deformable_products, deformable_shared_sort, deformable_tiles

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(gpus.extension() is None, reason="groupdetr_fast was built without its kernels")
with_cuda = pytest.mark.skipif(gpus.why_not_built() is not None, reason="groupdetr_fast was built without CUDA")

T4, V100, A100, B200 = (7, 5), (7, 0), (8, 0), (10, 0)
NAMES = {T4: "Tesla T4", V100: "Tesla V100", A100: "A100", B200: "B200"}


def made_up_extension(architectures="sm_80 sm_90 compute_90", cuda=13000, driver=13000):
    has_code = gpus.extension().has_code if gpus.extension() is not None else None
    return SimpleNamespace(
        architectures=architectures, cuda_version=cuda, cuda_driver_version=lambda: driver, has_code=has_code
    )


@pytest.fixture
def machine(monkeypatch):
    """A function that puts GPUs of these compute capabilities into the machine, and an extension in place of ours."""
    cached = (gpus.capability, gpus.why_not_compiled, gpus.why_not_triton, cross_attention._asked_once)

    def put(*capabilities, extension=None, triton=None):
        for function in cached:
            function.cache_clear()
        monkeypatch.setattr(library, "_warned", set())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: NAMES[capabilities[index]])
        monkeypatch.setattr(gpus, "extension", lambda: extension)
        if triton is not None:
            monkeypatch.setattr(gpus, "why_not_triton", triton)

    yield put
    for function in cached:
        function.cache_clear()


@compiled
@pytest.mark.parametrize(
    ("architectures", "served", "not_served"),
    [
        ("sm_80 sm_90 compute_90", [80, 86, 89, 90, 100, 103, 120, 121], [70, 75, 79]),
        ("sm_75", [75], [70, 72, 80, 90, 120]),
        ("sm_86 sm_100", [86, 87, 89, 100, 103], [75, 80, 90, 110, 120]),
        ("compute_75", [75, 80, 120], [70]),
        ("sm_90a compute_90a", [90], [89, 91, 100]),
        ("sm_100f compute_100f", [100, 103], [90, 110, 120]),
        ("", [], [75, 80]),
        ("nonsense", [], [75, 80]),
    ],
)
def test_which_gpus_code_serves(architectures, served, not_served):
    has_code = gpus.extension().has_code
    assert [capability for capability in served if not has_code(architectures, capability)] == []
    assert [capability for capability in not_served if has_code(architectures, capability)] == []


@compiled
@pytest.mark.parametrize(
    ("architectures", "served", "not_served"),
    [
        ("sm_75 sm_80 sm_90 compute_90", [80, 86, 90, 100, 120], [75]),
        ("sm_75 sm_80", [80, 86, 89], [75, 90]),
        ("sm_75 compute_75", [], [75, 80, 90]),
        ("sm_80 compute_75", [80, 89], [75, 90]),  # on the last, PTX of 7.5 would become its code
        ("compute_80", [80, 90, 120], [75]),
    ],
)
def test_which_gpus_code_for_tensor_cores_of_8_0_serves(architectures, served, not_served):
    has_code = gpus.extension().has_code
    assert [capability for capability in served if not has_code(architectures, capability, 80)] == []
    assert [capability for capability in not_served if has_code(architectures, capability, 80)] == []


CHOICES = {  # and what is chosen where the environment does not say
    "deformable_tiles": 1,
    "deformable_shared_sort": 0,
    "deformable_products": 0,
    "assignment_shared_costs": 1,
    "assignment_fixed_point": -1,
}


@compiled
@pytest.mark.parametrize("value", [None, "1", "0", "", "2"])
def test_the_environment_chooses_between_kernels(value):
    program = f"""
from groupdetr_fast import _gpus, ops
for choice in {list(CHOICES)}:
    choose = getattr(_gpus.extension(), f"choose_{{choice}}")
    print(choice, choose(True), choose(-1), choose(False), choose(False))
"""
    variables = {choice: f"GROUPDETR_FAST_{choice.upper()}" for choice in CHOICES}
    environment = {name: text for name, text in os.environ.items() if name not in variables.values()}
    environment |= {} if value is None else dict.fromkeys(variables.values(), value)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    chosen = {choice: {"1": 1, "0": 0}.get(value, otherwise) for choice, otherwise in CHOICES.items()}
    assert done.stdout.splitlines() == [f"{choice} {before} 1 -1 0" for choice, before in chosen.items()]


def choices():
    """What each choice is, asked without a change of it."""
    found = {}
    for name in CHOICES:
        choose = getattr(gpus.extension(), f"choose_{name}")
        found[name] = choose(0)
        choose(found[name])
    return tuple(found.values())


@compiled
def test_choices_for_a_while_nest_and_end_with_errors():
    before = choices()
    with (
        deformable_tiles(True),
        deformable_shared_sort(True),
        deformable_products(True),
        assignment_way(shared_costs=True, fixed_point=False),
    ):
        with deformable_tiles(False), deformable_shared_sort(False), assignment_way(fixed_point=True):
            assert choices() == (0, 0, 1, 1, 1)
        assert choices() == (1, 1, 1, 1, 0)
        with pytest.raises(KeyError), deformable_products(False), assignment_way(shared_costs=False):
            raise KeyError
        assert choices() == (1, 1, 1, 1, 0)
    assert choices() == before


def test_without_compiled_kernels_there_is_nothing_to_choose(machine):
    machine(extension=None)
    with deformable_tiles(True), deformable_shared_sort(True), deformable_products(True):
        pass
    with assignment_way(shared_costs=True, fixed_point=True):
        pass


@compiled
def test_the_extension_tells_what_it_was_built_for():
    extension = gpus.extension()
    assert (extension.architectures == "") == (extension.cuda_version == 0)
    assert extension.cuda_driver_version() >= 0
    assert gpus.built_for().startswith("the CPU")


@with_cuda
def test_the_extension_needs_no_cuda_library_and_loads_without_torch_cuda():
    """Its runtime is in it, and what a torch with CUDA has alone is weak: another torch's CUDA does not matter."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("readelf and nm of binutils are not installed")
    file = gpus.extension().__file__
    dynamic = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libtorch.so" in needed
    assert not {name for name in needed if "cuda" in name}
    symbols = subprocess.run(["nm", "-D", file], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[1] for line in symbols.splitlines() if line.split()[0] == "U"}
    assert not {name for name in undefined if name.startswith("cuda") or "cuda_stream" in name or "c10_cuda" in name}
    assert " w aoti_torch_get_current_cuda_stream" in symbols


@compiled
def test_why_a_gpu_has_no_compiled_kernels(machine):
    machine(T4, A100, extension=made_up_extension())
    assert gpus.why_not_compiled(0) == (
        "groupdetr_fast was built for sm_80, sm_90 and later (reinstall from source on this machine, or with "
        "TORCH_CUDA_ARCH_LIST=7.5)"
    )
    assert gpus.why_not_compiled(1) is None
    machine(A100, extension=made_up_extension(driver=12040))
    assert gpus.why_not_compiled(0) == (
        "groupdetr_fast was built with CUDA 13.0, and the driver supports CUDA 12.4 (update the driver, or install a "
        "build for CUDA 12)"
    )
    machine(A100, extension=made_up_extension(architectures="", cuda=0))
    assert gpus.why_not_compiled(0).startswith("groupdetr_fast was built without CUDA")
    machine(A100)
    assert gpus.why_not_compiled(0).startswith("groupdetr_fast was installed without its compiled kernels")


def test_why_a_gpu_has_no_triton_kernels(machine, monkeypatch):
    machine((6, 1))
    if gpus.importlib.util.find_spec("triton") is not None:
        assert gpus.why_not_triton(0) == "Triton needs compute capability 7.0"
        machine(T4)
        from triton.runtime import driver

        def fail():
            raise RuntimeError("Failed to find C compiler.\nMore")

        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=fail))
        assert gpus.why_not_triton(0) == (
            "Triton cannot build what launches its kernels (install gcc or set CC, and install python3-dev): "
            "Failed to find C compiler."
        )
        machine(T4)

        def fail_in_silence():
            raise AssertionError

        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=fail_in_silence))
        assert gpus.why_not_triton(0).endswith("and install python3-dev): AssertionError")
        machine(T4)
        monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=lambda: 0))
        assert gpus.why_not_triton(0) is None
    machine(A100)
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    assert gpus.why_not_triton(0) == "Triton is not installed (pip install triton)"


@with_cuda
def test_what_is_asked_about_one_op_concerns_no_other(machine):
    machine(A100, extension=made_up_extension(), triton=lambda index: pytest.fail("Triton was asked"))
    assert kinds_of("linear_assignment") == {"cpu": "C++", "cuda": "CUDA"}
    assert serves_everywhere("linear_assignment")


@pytest.mark.parametrize(
    ("capability", "reason", "serves"),
    [(T4, None, False), (A100, None, True), (A100, "Triton cannot build a launcher", False), (None, None, True)],
)
def test_which_gpus_attention_to_images_is_for(capability, reason, serves, machine):
    """Tensors that are traced may lie on a GPU that is not there, which is taken to serve."""
    machine(*([] if capability is None else [capability]), triton=lambda index: reason)
    assert cross_attention._serves(torch.device("cuda", 0)) is serves


@with_cuda
def test_deformable_attention_has_no_kernel_on_a_gpu_without_code(machine):
    machine(T4, A100, extension=made_up_extension())
    assert [has_kernel(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu", "meta")] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("reason", [None, "there is no code for it"])
def test_torch_compile_asks_the_gpu_without_a_graph_break(reason, monkeypatch):
    monkeypatch.setattr(kernels, "DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(gpus, "why_not_compiled", lambda index: os.getppid() and reason)

    def run(x):
        return x + 1 if has_kernel(torch.device("cuda", 0)) else x - 1

    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(1))
    assert found.item() == (1 if reason is None else -1)


def test_missing_kernels_are_told_by_device_and_reason(machine):
    served = {op for op, kinds in ops.backends().items() if kinds["cuda"] != "reference"}
    if served != set(ops.backends()):
        pytest.skip("groupdetr_fast was built without CUDA, or Triton is not installed")
    machine(T4, A100, extension=made_up_extension(), triton=lambda index: None)
    why = (
        "which is slow: groupdetr_fast was built for sm_80, sm_90 and later (reinstall from source on this machine, or "
        "with TORCH_CUDA_ARCH_LIST=7.5)"
    )
    assert ops.missing_kernels() == [
        f"on GPU 0 (Tesla T4, compute capability 7.5) linear_assignment runs on the CPU, {why}",
        f"on GPU 0 (Tesla T4, compute capability 7.5) ms_deform_attn runs in plain PyTorch, {why}",
    ]
    assert {op: kinds["cuda"] for op, kinds in ops.backends().items()} == {
        "cross_attention": "Triton",
        "grouped_attention": "Triton",
        "linear_assignment": "reference",
        "matching_cost": "Triton",
        "ms_deform_attn": "reference",
        "sigmoid_focal_loss": "Triton",
    }
    assert ops.backends(ask_gpu=False)["ms_deform_attn"]["cuda"] == "CUDA"
    machine(A100, extension=made_up_extension(), triton=lambda index: "Triton is not there")
    assert ops.missing_kernels() == [
        "on GPU 0 (A100, compute capability 8.0) grouped_attention, cross_attention, matching_cost and "
        "sigmoid_focal_loss run in plain PyTorch, which is slow: Triton is not there"
    ]
    machine(A100, extension=made_up_extension(), triton=lambda index: None)
    assert ops.missing_kernels() == []


@compiled
def test_without_a_gpu_only_a_torch_with_cuda_is_told_of_gpus(machine, monkeypatch):
    monkeypatch.setattr(library, "_kernel_kind", lambda op, key: "reference" if key == "CUDA" else "C++")
    machine(extension=made_up_extension("", cuda=0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any(
        sentence.startswith(
            "on GPUs linear_assignment runs on the CPU, which is slow: groupdetr_fast was built without"
        )
        for sentence in ops.missing_kernels()
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ops.missing_kernels() == []


def test_the_command_explains_what_is_missing(machine, capsys):
    machine(V100, extension=made_up_extension("sm_75 sm_80", cuda=12080), triton=lambda index: "no Triton")
    cli.main(["env"])
    text = capsys.readouterr().out
    assert "built for       the CPU, and with CUDA 12.8 for sm_75, sm_80\n" in text
    assert "GPU 0           Tesla V100, compute capability 7.0\n" in text
    assert "matching_cost and sigmoid_focal_loss run in plain PyTorch, which is slow: no Triton.\n" in text


def test_importing_asks_no_gpu():
    """Asking initialises CUDA, after which a process cannot be forked: data loaders start their workers so."""
    program = """
import torch
torch.cuda.get_device_capability = torch.cuda.get_device_name = torch.cuda.current_device = None
import groupdetr_fast, groupdetr_fast.integrations.detr, groupdetr_fast.integrations.kernels
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


def test_a_triton_op_runs_on_its_reference_where_triton_cannot_serve(machine, monkeypatch):
    kernels = {}
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_triton, "register_kernel", lambda op, kernel, key: kernels.update({(op, key): kernel}))
    _triton.register_triton("sigmoid_focal_loss", "no.such.module", "forward")
    machine(T4, triton=lambda index: "it is not there")
    monkeypatch.setattr(gpus, "name", lambda index: "GPU 0 (Tesla T4)")
    logits, classes = torch.randn(2, 5, 3), torch.tensor([[0, 1, 2, -1, -1]] * 2)
    arguments = logits, classes, 0.25, 2.0
    with pytest.warns(
        UserWarning, match=r"on GPU 0 \(Tesla T4\) sigmoid_focal_loss runs in plain PyTorch, which is slow"
    ):
        first = kernels["sigmoid_focal_loss", "CUDA"](*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        second = kernels["sigmoid_focal_loss", "CUDA"](*arguments)
    torch.testing.assert_close(first, ops.sigmoid_focal_loss(logits, classes))
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def reference_caller(tmp_path_factory):
    """``torch.ops.reference_caller``, whose ops call references from C++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    target = tmp_path_factory.mktemp("reference_caller") / "reference_caller.so"
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *include_paths())]
    libraries = [argument for folder in library_paths() for argument in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    source = Path(__file__).with_name("reference_caller.cpp")
    command = [compiler, *options, *includes, str(source), "-o", str(target), *libraries, "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    torch.ops.load_library(str(target))
    return torch.ops.reference_caller


def test_compiled_kernels_call_references(reference_caller, monkeypatch):
    """Numbers, lists of them and several results come through, and users are told."""
    monkeypatch.setattr(library, "_warned", set())
    monkeypatch.setattr(library, "_why_not", lambda name, index: "it is too old")
    monkeypatch.setattr(gpus, "name", lambda index: "a made-up GPU")
    cost, num_targets = torch.randn(2, 3, 4), torch.tensor([3, 2])
    with pytest.warns(UserWarning, match="on a made-up GPU linear_assignment runs on the CPU.*: it is too old"):
        assigned = reference_caller.linear_assignment(cost, num_targets)
    assert torch.equal(assigned, linear_assignment_reference(cost, num_targets))
    value, grad = torch.randn(1, 6, 2, 3), torch.randn(1, 4, 6)
    locations, weights = torch.rand(1, 4, 2, 2, 1, 2), torch.rand(1, 4, 2, 2, 1)
    arguments = (grad, value, [2, 2, 1, 2], locations, weights, True)
    with pytest.warns(UserWarning, match="ms_deform_attn_backward runs in plain PyTorch"):
        results = reference_caller.ms_deform_attn_backward(*arguments)
    torch.testing.assert_close(results, ms_deform_attn_backward_reference(*arguments))


def test_an_extension_that_does_not_load_says_what_to_do(tmp_path):
    """As one that was built for another Python or torch does; the package is copied beside a broken extension."""
    package = tmp_path / "groupdetr_fast"
    shutil.copytree(Path(library.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.abi3.so").write_bytes(b"no machine code")
    program = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import groupdetr_fast
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
    message = done.stderr.decode().splitlines()[-1]
    assert done.returncode != 0
    assert message.startswith(
        f"ImportError: the compiled kernels of groupdetr_fast do not load in torch {torch.__version__} on Python "
    )
    assert message.endswith("Install one of its wheels, or reinstall it from source in this environment.")
