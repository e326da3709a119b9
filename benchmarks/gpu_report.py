"""Everything that needs a GPU, in stages of a few minutes each.

    python benchmarks/gpu_report.py smoke [ops ...] --results results [--minutes 2] [--rehearse]

smoke    every op against its float64 reference, dropout's mask, determinism, CUDA graphs; the card's own limits
ops      times of every op against its peers, forward and with backward
step     whole training steps: time, host synchronisations, memory
tests    the test suite's tests on a GPU
tune     tiles of the kernels; profiles; the sanitizer
all      one after another

A stage appends its rows, one by one, to ``<results>/<stage>.jsonl``, ends within its minutes, and can be repeated
alone. Several stages share ``--minutes``: each takes what it usually does at most, and the last one what is left; one
for which nothing is left has a row that says so. None needs an installation, git, a network or a compiler:
``PYTHONPATH=.`` and an extension that was built before will do.
What a missing package is needed for is left out, with the reason.

The exit status is 1 if something is wrong; what is missing is not.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from gpu.recorder import Recorder
from harness.places import RESULTS

ROWS = RESULTS / "gpu"
MINUTES = {"smoke": 100 / 60, "ops": 200 / 60, "step": 4.0, "tests": 2.5, "tune": 2.0}


def minutes_of(stage: str, end: float | None, *, last: bool) -> float:
    """What a stage may take: what it usually does, and with an end at most until then; the last one takes all of it."""
    if end is None:
        return MINUTES[stage]
    left = (end - time.monotonic()) / 60
    return left if last else min(left, MINUTES[stage])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*MINUTES, "all"], metavar="STAGE")
    parser.add_argument("--results", type=Path, default=ROWS, help="folder of the rows")
    parser.add_argument("--minutes", type=float, help="time for the stage, or for all stages together")
    parser.add_argument("--rehearse", action="store_true", help="the whole stage at tiny sizes, on the CPU")
    parser.add_argument(
        "--only",
        default="",
        help="regular expression: parts of smoke, works of ops, models of step, compile, graph of MODEL, test files",
    )
    parser.add_argument("--commit", default="", help="what the rows name as the commit, where git is not at hand")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.exit(1, "gpu_report.py needs a GPU, but torch finds none; --rehearse runs on the CPU\n")
    device = torch.device("cpu" if options.rehearse else "cuda")
    stages = list(MINUTES) if "all" in options.stages else options.stages
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    wrong = False
    for number, stage in enumerate(stages, 1):
        minutes = minutes_of(stage, end, last=number == len(stages))
        recorder = Recorder(
            options.results,
            stage,
            device=device,
            minutes=max(minutes, 0.0),
            rehearsal=options.rehearse,
            commit=options.commit,
            only=options.only,
        )
        if minutes > 0:
            importlib.import_module(f"gpu.{stage}").run(recorder)
        else:
            recorder.add("stage", status="missing", note="no time: the stages before it took all")
        wrong |= recorder.found_wrong
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
