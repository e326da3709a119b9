"""Counts the instructions of the inner loop of every GPU kernel by kind, from its machine code, without a GPU.

    python benchmarks inner_loops --only cross_attention --architectures 90
    python benchmarks inner_loops --only deform_backward --against HEAD~3

What a loop has more of than its peers is where to look first; how long it takes is for a GPU to say. Kernels are
compiled in the configurations that compile_gpu compiles. With --against each count stands beside the one that a table
of another commit has, and the ratio of the two.

The inner loop is the longest loop that multiplies and has no other such loop in it; of a kernel without products, it is
the longest one that has no other in it. Where that misleads, loops are looked up by the function that has them
(loops.py says which and why), and named after it: solve_assignments<float, 32, 32, false, false, true>: relax.
Instructions are counted as they stand in the loop: all branches, whether a turn takes them or not, and all turns that
the compiler unrolled into one. Kinds are those of sass.py.
"""

import argparse
import csv
import io
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.places import ROOT

from .compile_gpu import LOOPS, add_options, find_work, measure_all, read, table, update
from .loops import Loop

# Kinds that older tables do not have, and among which kind they counted them.
PART_OF = {"reductions": "memory", "double": "float"}


def read_earlier(against: str) -> list[dict[str, str]]:
    """The rows of a csv file, or of the table at a commit.

    Raises:
        ValueError: if it is neither.
    """
    if Path(against).is_file():
        rows = read(Path(against))
    else:
        command = ["git", "-C", str(ROOT), "show", f"{against}:{LOOPS.relative_to(ROOT)}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{against} is neither a csv file nor a commit that has {LOOPS.relative_to(ROOT)}")
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
    if not rows or not {"kernel", "architecture", "instructions"} <= set(rows[0]):
        raise ValueError(f"{against} has no table of inner loops")
    return rows


def compare(before: Sequence[dict[str, str]], after: Sequence[Loop]) -> str:
    """Both counts and their ratios of each kernel that has changed, without kinds of which there is nothing.

    Kernels that one table alone has come last, by name.
    """
    old = {(row["kernel"], int(row["architecture"])): row for row in before}
    new = {(loop.kernel, loop.architecture): loop for loop in after}
    earlier = [field for field in Loop._fields[2:] if any(field in row for row in before)]
    fields = [
        field
        for field in earlier
        if any(row[field] not in ("", "0") for row in before) or any(getattr(loop, field) for loop in after)
    ]
    rows: list[list[object]] = []
    for key in new.keys() & old.keys():
        was = [int(old[key][field]) if old[key][field] else None for field in fields]
        now = [_comparable(new[key], field, earlier) for field in fields]
        if was != now:
            rows += [[*key, "before", *was], [*key, "after", *now], [*key, "ratio", *map(_ratio, was, now)]]
    rows.sort(key=lambda row: row[:2])  # which leaves the three of a kernel in their order
    both = len(new.keys() & old.keys())
    parts = [table(["kernel", "architecture", "", *fields], rows)] if rows else []
    parts.append(f"{both} kernels are in both, {both - len(rows) // 3} of them with the same numbers")
    for title, keys in ("before alone", old.keys() - new.keys()), ("after alone", new.keys() - old.keys()):
        if keys:
            parts.append("\n".join([f"{title}:", *(f"  {kernel}, {number}" for kernel, number in sorted(keys))]))
    return "\n\n".join(parts)


def _comparable(loop: Loop, field: str, earlier: Sequence[str]) -> int | None:
    """A number of a loop, with those of the kinds that an earlier table, which has these fields, counted among it."""
    parts = [part for part, whole in PART_OF.items() if whole == field and part not in earlier]
    number: int | None = getattr(loop, field)
    return number if number is None else number + sum(getattr(loop, part) for part in parts)


def _ratio(before: int | None, after: int | None) -> str | None:
    if before is None or after is None:
        return None
    return f"{after / before:.2f}" if before else "1.00" if not after else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [90])
    parser.add_argument("--against", metavar="COMMIT_OR_CSV", help="compare with a table of other kernels")
    parser.add_argument("--csv", type=Path, default=LOOPS, help="where the table goes")
    options = parser.parse_args()
    try:
        earlier = read_earlier(options.against) if options.against else []
    except ValueError as error:
        raise SystemExit(f"--against: {error}") from None
    work = find_work(options.only, options.architectures)
    found = [loop for measured in measure_all(work, options.jobs) for loop in measured.loops]
    update(options.csv, Loop._fields, found, work)
    loops = [loop for loop in found if re.search(options.only, loop.kernel)]
    print(table(Loop._fields, loops))
    if options.against:
        of_these = [
            row
            for row in earlier
            if re.search(options.only, row["kernel"]) and int(row["architecture"]) in options.architectures
        ]
        print(f"\nagainst {options.against}:\n\n{compare(of_these, loops)}")
