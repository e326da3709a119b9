"""What goes to a GPU machine, without a network: wheels made here stand in for downloaded ones."""

import os
import sys
import zipfile

import pytest

from gpu import carry
from gpu.carry import LeftOut, Requirement, Wheel, choose, collect, fill, meaningful_lines, unfit


def make_wheel(folder, name, *, requires=(), packages=None, size=0):
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\n{metadata}\nRequires-Dist: prose\n")
        for package in packages or [name]:
            archive.writestr(f"{package}/__init__.py", "x" * size)
    return wheel


@pytest.fixture
def registry(tmp_path):
    """Names of packages to the wheels that there are."""
    wheels = {}

    def fetch(requirement):
        if requirement.name not in wheels:
            raise LeftOut("has no wheel")
        return wheels[requirement.name]

    def add(name, **options):
        wheels[name] = make_wheel(tmp_path, name, **options)

    fetch.add = add
    return fetch


def collected(registry, names, present=()):
    wheels, left_out = collect([(Requirement(name), "a list") for name in names], present, registry)
    return [wheel.name for wheel in wheels], left_out


def test_what_wheels_need_comes_along(registry):
    registry.add(
        "a", requires=["b>=1", "There_Already>=2", "extra-only; extra == 'more'", "old; python_version < '3.10'"]
    )
    registry.add("b", requires=["a", "c; sys_platform == 'linux' and python_version >= '3.12'"])
    registry.add("c")
    assert collected(registry, ["a", "c"], ["there-already"]) == (["a-1.0", "c-1.0", "b-1.0"], [])


def test_reasons_name_the_package_and_who_needs_it(registry):
    registry.add("a", requires=["b>=2"])
    assert collected(registry, ["a", "c==3"]) == (
        ["a-1.0"],
        [("c==3", "has no wheel; needed by a list"), ("b>=2", "has no wheel; needed by a-1.0")],
    )


def test_the_first_of_two_wheels_with_one_package_is_taken(registry):
    registry.add("first", packages=["shared", "own"])
    registry.add("second", packages=["shared"], requires=["first"])
    names, left_out = collected(registry, ["first", "second"])
    assert names == ["first-1.0"]
    assert left_out == [("second", "installs shared, as first-1.0 does; needed by a list")]


def test_small_wheels_come_before_a_large_one(tmp_path):
    wheels = [
        Wheel(make_wheel(tmp_path, name, size=size), "a list") for name, size in (("l", 5000), ("s", 1), ("m", 9))
    ]
    large, small, medium = (wheel.path.stat().st_size for wheel in wheels)
    assert choose(wheels, large + small + medium) == ([wheels[1], wheels[2], wheels[0]], [])
    chosen, left_out = choose(wheels, large + small + medium - 1)
    assert chosen == [wheels[1], wheels[2]]
    assert left_out == [("l-1.0", "too large: 0.0 MiB, with 0.0 MiB left; needed by a list")]


def test_folder_is_replaced_and_says_what_is_not_in_it(tmp_path):
    folder, binary = tmp_path / "folder", tmp_path / "_C.abi3.so"
    folder.mkdir()
    (folder / "stale.whl").touch()
    binary.write_bytes(b"code")
    wheel = Wheel(make_wheel(tmp_path, "a"), "a list")
    fill(folder, binary, [wheel], [("b==2", "has no wheel")])
    assert {path.name for path in folder.iterdir()} == {"_C.abi3.so", wheel.path.name, "LEFT_OUT.md"}
    assert (
        folder / "LEFT_OUT.md"
    ).read_text() == "# Left out\n\n| package | why |\n| --- | --- |\n| b==2 | has no wheel |\n"


def test_choice_of_the_extension(tmp_path):
    path, source = tmp_path / "_C.abi3.so", tmp_path / "op.cu"
    source.touch()
    assert unfit(path, [source], lambda _: {"sm_90"}) == "is missing"
    path.touch()
    os.utime(path, (0, 0))
    assert unfit(path, [source], lambda _: {"sm_90"}) == "is older than its sources"
    os.utime(path, (source.stat().st_mtime + 1,) * 2)
    assert unfit(path, [source], lambda _: {"sm_80"}) == "has no code for sm_90"
    assert unfit(path, [source], lambda _: {"sm_80", "sm_90"}) == ""


def test_architectures_are_read_from_the_file(tmp_path, monkeypatch):
    program = tmp_path / "cuobjdump"
    program.write_text(
        "#!/bin/sh\necho 'ELF file    1: _C.abi3.1.sm_80.cubin'\necho 'ELF file    2: _C.abi3.2.sm_90a.cubin'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(carry, "find_cuobjdump", lambda: str(program))
    assert carry.architectures(tmp_path / "_C.abi3.so") == {"sm_80", "sm_90a"}
    monkeypatch.setattr(carry, "find_cuobjdump", lambda: None)
    assert carry.architectures(tmp_path / "_C.abi3.so") == set()


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: the outcome of each command, in turn; the commands that were run."""
    commands = []

    def prepare(*outcomes):
        remaining = iter(outcomes)

        def run(command, **environment):
            commands.append(command)
            code, error, wheel = next(remaining)
            folder = next(command[i + 1] for i, word in enumerate(command) if word in ("--dest", "--wheel-dir"))
            if wheel:
                make_wheel(carry.Path(folder), wheel)
            return carry.subprocess.CompletedProcess(command, code, "", error)

        monkeypatch.setattr(carry, "run", run)
        monkeypatch.setattr(carry, "builder_environment", lambda builder: {})
        return commands

    return prepare


NONE = (1, "ERROR: No matching distribution found for a==1\n", None)


def test_a_wheel_is_downloaded_for_the_gpu_machine(pip, tmp_path):
    commands = pip((0, "", "a"))
    assert carry.fetch_wheel(Requirement("a==1; python_version > '3'"), tmp_path, None).parent == tmp_path
    (command,) = commands
    assert command[-1] == "a==1"
    assert "--only-binary=:all:" in command
    assert command[command.index("--python-version") + 1] == "3.12"


@pytest.mark.parametrize(
    ("outcomes", "builder", "reason"),
    [
        ([NONE], None, "has no wheel for Python 3.12, and there is no --builder to compile it"),
        ([NONE, (1, "x.cu(3): error\nERROR: no\n", None)], "python", "has no wheel .* does not compile: ERROR: no"),
        ([(1, "ERROR: the network is down\n", None)], None, "pip download failed: ERROR: the network is down"),
    ],
)
def test_why_there_is_no_wheel(pip, tmp_path, outcomes, builder, reason):
    pip(*outcomes)
    with pytest.raises(LeftOut, match=reason):
        carry.fetch_wheel(Requirement("a==1"), tmp_path, builder)


def test_a_builder_compiles_what_has_no_wheel(pip, tmp_path):
    commands = pip(NONE, (0, "", "a"))
    assert carry.fetch_wheel(Requirement("a==1"), tmp_path, "python3.12").name == "a-1.0-py3-none-any.whl"
    assert commands[1][:4] == ["python3.12", "-m", "pip", "wheel"]


def test_a_wheel_that_was_compiled_before_serves_without_a_builder(pip, tmp_path):
    earlier, work = tmp_path / "earlier", tmp_path / "work"
    earlier.mkdir()
    work.mkdir()
    wheel = make_wheel(earlier, "a_b")
    commands = pip(NONE, NONE, NONE, (0, "", "b"))
    assert carry.fetch_wheel(Requirement("a-b==1"), work, None, earlier) == work / wheel.name
    with pytest.raises(LeftOut):
        carry.fetch_wheel(Requirement("a-b==2"), work, None, earlier)
    carry.fetch_wheel(Requirement("a-b==1"), work, "python3.12", earlier)
    assert commands[-1][:4] == ["python3.12", "-m", "pip", "wheel"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib")
def test_what_no_gpu_needs_stays_here():
    wanted = {requirement.name for requirement, _ in carry.wanted(carry.ROOT / "pyproject.toml", carry.EXTRAS, [])}
    assert not wanted & set(carry.STAY_HERE)
    assert {"hotcoco", "pycocotools", "tyro", "hypothesis"} <= wanted


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib")
def test_peers_are_wanted_at_the_compared_versions():
    wanted = list(carry.wanted(carry.ROOT / "pyproject.toml", carry.EXTRAS, carry.PEERS))
    lines = {str(requirement) for requirement, _ in wanted}
    assert {"rfdetr==1.11.2", "torch-hungarian==0.1.0rc0", "deformops==3.0.1", "lapx==0.11.1"} <= lines
    assert {by for _, by in wanted} == {
        "the extra train",
        "the extra bench",
        "the extra test",
        "peers.txt",
        "peers_apart.txt",
    }
    present = {name for line in meaningful_lines(carry.MACHINE) for name in line.split()}
    missing = {requirement.name for requirement, _ in wanted} - present
    assert {"pycocotools", "tyro"} <= missing
    assert "torch" in present
