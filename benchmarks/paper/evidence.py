"""The paper's tables and figures by trainings on one GPU: one command, which ends in time and goes on later.

    python benchmarks evidence table_1 [ablation ...] --minutes 5 [--results DIR] [--earlier DIR]

Each name is a command of ``groupdetr analyze``, which this program prints and runs, one after another, most wanted
first. Where the time is over, the command is asked to stop: what was trained stays in runs/evidence, and the same line
goes on. ``--results`` gets an archive for each folder of runs, with what finished runs have found, tables, figures and
logs, but no weights: at once, and anew after each measurement and after half of its seeds. ``--earlier`` begins with
what such archives hold, on whichever machine they were made.

The exit status is 0 if all is measured, 75 if the same line has to go on, and else that of the first that failed.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from groupdetr_fast.training.faults import EXIT_STOPPED
from harness.places import ROOT, python_path

from .measurements import DATA, FOLDERS, MEASUREMENTS, arguments_of, folder_of, in_steps

__all__ = ["main"]

# For runs to write a checkpoint and for the sweep to end. The sweep would wait longer, but a run that is not
# finished is not in the archive, and a run whose sweep is killed ends by itself.
STOP_SECONDS = 15
PACK_SECONDS = 15  # for what comes after the last run: its archive, and the end of MPS
BEGIN_SECONDS = 10  # below which nothing is begun any more
MPS_SECONDS = 60  # for a process to begin and to use the GPU, where there is as much time
# What an archive has of a finished run, whose weights would take too much room. The rest is of the measurement.
LOGS = ("log.txt", "train.log")  # what it printed; and warnings, with their times
OF_RUNS = ("settings.json", "results.json", "measured.json", "distances.csv", *LOGS)


def run_until(command: Sequence[str], environment: Mapping[str, str], end: float) -> int:
    """The exit status of a command, or that of a stopped training: it is asked to stop in time, and killed at the end.

    Args:
        command: handles SIGTERM as ``groupdetr analyze`` does.
        environment: variables besides those of this process.
        end: as of ``time.monotonic()``.
    """
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, end - STOP_SECONDS - time.monotonic()))
        print("asked to stop: the time is over", flush=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            # Negative before it has come to its runs: nothing has begun that could be stopped otherwise.
            status = process.wait(max(1.0, end - time.monotonic()))
            return EXIT_STOPPED if status == -signal.SIGTERM else status
        return EXIT_STOPPED
    finally:
        if process.poll() is None:
            process.kill()  # its runs then write a checkpoint and end by themselves
            process.wait()


def pack(folder: Path, archive: Path) -> None:
    """Write what is known of a folder of runs: measurements, finished runs without their weights, all logs."""
    unfinished = archive.with_name(f".{archive.name}")
    with tarfile.open(unfinished, "w:gz") as packed:
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            packed.add(file, file.name)
        for run in sorted((folder / "runs").glob("*")):
            done = (run / "measured.json").is_file()
            for file in (run / name for name in OF_RUNS):
                if file.is_file() and (done or file.name in LOGS):
                    packed.add(file, f"{'runs' if done else 'unfinished'}/{run.name}/{file.name}")
    unfinished.rename(archive)


def unpack(archive: Path, folder: Path) -> None:
    """Put finished runs of an archive where they are not finished yet."""
    with tempfile.TemporaryDirectory() as place, tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")
        for run in Path(place, "runs").glob("*"):
            if not (folder / "runs" / run.name / "measured.json").exists():
                shutil.copytree(run, folder / "runs" / run.name, dirs_exist_ok=True)


@contextmanager
def multi_process_service(wanted: bool, end: float) -> Iterator[dict[str, str]]:
    """NVIDIA's MPS, by which kernels of several processes run at once, as variables for the processes.

    Where it does not start, or a process cannot use the GPU by it, there are none and all goes on without.

    Args:
        wanted: if not, there are none.
        end: as of ``time.monotonic()``, until when it has begun and ended; it begins :data:`PACK_SECONDS` before.
    """
    program = shutil.which("nvidia-cuda-mps-control") if wanted else None
    if program is None:
        if wanted:
            print("nvidia-cuda-mps-control is not installed: without MPS", flush=True)
        yield {}
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **variables}
        check = [sys.executable, "-c", "import torch; assert torch.ones(8, device='cuda').sum().item() == 8"]
        begun = end - PACK_SECONDS
        try:
            timeout = _mps_seconds(begun)
            subprocess.run([program, "-d"], env=environment, stdin=subprocess.DEVNULL, check=True, timeout=timeout)
            try:
                subprocess.run(check, env=environment, check=True, timeout=_mps_seconds(begun))
            except (OSError, subprocess.SubprocessError):
                _quit(program, environment, begun)
                raise
        except (OSError, subprocess.SubprocessError) as error:
            print(f"without MPS: {error}", flush=True)
            yield {}
            return
        print("with MPS", flush=True)
        try:
            yield variables
        finally:
            _quit(program, environment, end)


def _mps_seconds(end: float) -> float:
    return max(1.0, min(MPS_SECONDS, end - time.monotonic()))


def _quit(program: str, environment: Mapping[str, str], end: float) -> None:
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run([program], env=environment, input="quit\n", text=True, timeout=_mps_seconds(end))


def measure(
    name: str, line: Sequence[str], environment: Mapping[str, str], end: float, keep: Callable[[], None]
) -> int:
    """Make a measurement in steps, each as far as there is time; the first exit status that is not 0.

    Args:
        name: what is printed before every line.
        line: arguments of ``groupdetr analyze``.
        environment: variables besides those of this process.
        end: as of ``time.monotonic()``.
        keep: called after every step, whatever became of it.
    """
    for arguments in in_steps(line):
        print(f"{name}: groupdetr analyze {shlex.join(arguments)}", flush=True)
        if end - time.monotonic() < STOP_SECONDS + BEGIN_SECONDS:
            print(f"{name}: no time", flush=True)
            return EXIT_STOPPED
        began = time.monotonic()
        status = run_until([sys.executable, "-m", "groupdetr_fast", "analyze", *arguments], environment, end)
        print(f"{name}: exit status {status} after {time.monotonic() - began:.0f} s", flush=True)
        keep()
        if status != 0:
            return status
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    lines = [f"  {name:20}{measurement.shows}" for name, measurement in MEASUREMENTS.items()]
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n" + "\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS, metavar="NAME", help="see above")
    parser.add_argument("--minutes", type=float, required=True, help="for all of it, until the last archive is written")
    parser.add_argument("--results", type=Path, help="folder for the archives")
    parser.add_argument("--earlier", type=Path, help="folder of archives to begin with")
    for name, place in FOLDERS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=place,
            metavar="DIR",
            help=f"with annotations/, images/ and lite0.safetensors; {place}",
        )
    parser.add_argument("--jobs", type=int, help="runs at a time, instead of one for each core")
    parser.add_argument("--mps", action="store_true", help="let kernels of several runs work at once, by NVIDIA's MPS")
    parser.add_argument("--rehearse", action="store_true", help="all of it at a tiny size, on the CPU")
    options = parser.parse_args(arguments)
    end = start + 60 * options.minutes
    folders = {name: ROOT / folder_of(name, options.rehearse) for name in options.names}
    data = {name: getattr(options, name) for name in FOLDERS}
    for folder in sorted(set(folders.values())):
        archive = options.earlier and options.earlier / f"{folder.name}.tar.gz"
        if archive and archive.is_file():
            unpack(archive, folder)
        _keep(folder, options.results)  # also of measurements that get no time
    variables = {"GROUPDETR_FAST_CACHE": str(DATA), "PYTHONPATH": python_path(ROOT)}
    if options.rehearse:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    statuses = []
    with multi_process_service(options.mps, end) as of_service:
        for name in options.names:
            line = arguments_of(name, data, options.rehearse)
            line += [] if options.jobs is None else ["--jobs", str(options.jobs)]
            keep = partial(_keep, folders[name], options.results)
            statuses.append(measure(name, line, {**variables, **of_service}, end - PACK_SECONDS, keep))
    return EXIT_STOPPED if EXIT_STOPPED in statuses else next(filter(None, statuses), 0)


def _keep(folder: Path, results: Path | None) -> None:
    """Write the archive of a folder of runs if both are there and wanted."""
    if results and folder.is_dir():
        results.mkdir(parents=True, exist_ok=True)
        pack(folder, results / f"{folder.name}.tar.gz")


if __name__ == "__main__":
    sys.exit(main())
