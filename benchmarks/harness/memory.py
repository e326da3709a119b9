"""Peak memory of one contender, in a process of its own.

What is measured is resident memory, as the operating system counts it: everything that the work really occupied at its
peak, be it torch's, a peer's or the allocator's, less what was occupied before it began. A profiler of torch's
allocations would miss what others allocate, and ``ru_maxrss`` alone would report the import of torch where that took
more than the work; so Linux is asked to forget the peak before the work begins.

The package, its threads and its code are warmed up by a small problem, so that they do not count.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .interleave import in_one_line
from .places import ROOT, python_path

__all__ = ["Peak", "forget_peak", "give_back_freed", "peak_in_new_process", "resident"]


@dataclass(frozen=True)
class Peak:
    """``status`` and ``note`` are those of ``harness.interleave.Timing``."""

    status: str = "ok"
    note: str = ""
    bytes: int | None = None


def peak_in_new_process(module: str, case: str, contender: str, *, small: bool = False) -> Peak:
    """Measure a contender of a benchmark.

    Args:
        module: name of the benchmark's module, which has ``CASES``, each with a method ``small``, and ``prepare``.
        case: one of them, as a string.
        contender: one of those that ``prepare`` returns.
        small: run the case's small problem, only to see that it works.
    """
    give_back_freed()
    command = [sys.executable, "-m", "harness.memory", module, case, contender, *(["--small"] if small else [])]
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT / "benchmarks")}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"measuring the memory of {contender} failed:\n{process.stderr[-4000:]}")
    return Peak(**json.loads(process.stdout.splitlines()[-1]))


def _measure(module_name: str, case_name: str, contender: str, small: bool) -> Peak:
    module = importlib.import_module(module_name)
    case = next(case for case in module.CASES if str(case) == case_name)
    try:
        module.prepare(case.small())[0][contender]()
        contenders, check = module.prepare(case.small() if small else case)
        gc.collect()
        forget_peak()
        before = resident("VmRSS")
        result = contenders[contender]()
        peak = resident("VmHWM") - before
        check(result)
    except (ImportError, NotImplementedError) as error:
        return Peak("missing", in_one_line(error))
    except AssertionError as error:
        return Peak("wrong", in_one_line(error))
    return Peak(bytes=peak)


def give_back_freed() -> None:
    """Give the memory that this process freed back to the system, also where it was told to keep that.

    Steps of one contender and another in turn leave tens of GB, which whatever is measured next may need.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # of glibc; other libraries' malloc keeps little
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Let the peak of resident memory be what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of resident memory of this process: "VmRSS", now, or "VmHWM", at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"the operating system does not tell {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for argument in ("module", "case", "contender"):
        parser.add_argument(argument)
    parser.add_argument("--small", action="store_true", help="a small problem, to see that it works")
    print(json.dumps(asdict(_measure(*vars(parser.parse_args()).values()))))


if __name__ == "__main__":
    main()
