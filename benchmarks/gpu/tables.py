"""What the rows of gpu_report.py say, as tables: of a folder's newest run of each stage, and of parts measured since.

python benchmarks gpu_tables [--results DIR]     print the tables
python benchmarks gpu_tables --write             write DIR/report.md, and the short ones into docs
python benchmarks gpu_tables --check             fail if docs has other ones
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.documents import ON_A_GPU, PERFORMANCE, read_section, significant, table, write_section
from harness.places import RESULTS
from harness.results import OURS
from paper import roofline

ROWS = RESULTS / "gpu"
SECTION, GOALS_SECTION = "gpu", "gpu_goals"
# A stage's run counts if it got so far as to write a row of this kind.
STAGES = {"smoke": "operator", "ops": "time", "step": "step", "tests": "tests", "tune": "best_tile"}

Row = dict[str, Any]


class Run(NamedTuple):
    """A run of a stage: what its numbers depend on, and its other rows."""

    environment: Row
    rows: list[Row]

    def of(self, kind: str, **fields: Any) -> list[Row]:
        """The good rows of a kind with these fields."""
        return [
            row
            for row in self.rows
            if row["kind"] == kind and row["status"] == "ok" and all(row.get(name) == fields[name] for name in fields)
        ]


def runs_of(folder: Path, stage: str) -> list[Run]:
    """The newest whole run of a stage, then what was measured again since in part: of each part the newest run.

    Rehearsals do not count, nor runs without a row of the stage's kind that is not missing.
    """
    file = folder / f"{stage}.jsonl"
    if not file.exists():
        return []
    by_name: dict[str, list[Row]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        by_name.setdefault(row["run"], []).append(row)
    parts: dict[str, Run] = {}
    for environment, *rows in by_name.values():
        measured = any(row["kind"] == STAGES[stage] and row["status"] != "missing" for row in rows)
        if environment["rehearsal"] or not measured:
            continue
        part = environment.get("only", "")
        parts = parts if part else {}  # a whole run has everything anew
        parts.pop(part, None)  # so that the newest is the last
        parts[part] = Run(environment, rows)
    return list(parts.values())


def origin(run: Run) -> str:
    """Card, versions and commit, in a sentence for above a table."""
    environment = run.environment
    versions = environment["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    date = f"{run.environment['run'][:4]}-{run.environment['run'][4:6]}-{run.environment['run'][6:8]}"
    driver = f"driver {environment['driver']}, " if environment.get("driver") else ""
    return f"{environment['device']}, {driver}{names}, commit {environment['commit']}, {date}."


# --- Times of ops ---


class Times(NamedTuple):
    """Seconds of a contender: of the GPU for forward and for backward, and of an eager call of both."""

    forward: float | None
    backward: float | None
    wall: float
    host: float


def works(run: Run) -> Iterator[tuple[Row, dict[str, Times]]]:
    """Every work that was timed, and its contenders' times."""
    found: dict[tuple, dict[str, dict[str, Row]]] = {}
    for row in run.of("time"):
        found.setdefault(key_of(row), {}).setdefault(row["contender"], {})[row["pass"]] = row
    for key, contenders in found.items():
        yield dict(key), {name: times_of(passes) for name, passes in contenders.items()}


def key_of(row: Row) -> tuple:
    return tuple((name, row.get(name)) for name in ("work", "case", "batch", "dtype", "dropout"))


def newest_works(runs: Sequence[Run]) -> list[Run]:
    """The runs without the times of what a later one has timed again, beside as many peers."""
    kept: list[Run] = []
    seen: dict[tuple, set[str]] = {}
    for run in reversed(runs):
        own: dict[tuple, set[str]] = {}
        for row in run.of("time"):
            own.setdefault(key_of(row), set()).add(row["contender"])
        again = {key for key, names in own.items() if key in seen and set(peers(dict.fromkeys(names))) <= seen[key]}
        kept.append(run._replace(rows=[row for row in run.rows if row["kind"] != "time" or key_of(row) not in again]))
        for key, names in own.items():
            if OURS in names:
                seen.setdefault(key, set()).update(names)
    return kept[::-1]


def times_of(passes: dict[str, Row]) -> Times:
    """Of rows by pass; the backward pass is what both together take longer than the forward pass."""
    forward, last = (gpu_seconds(passes.get(name)) for name in ("forward", "both"))
    backward = last - forward if forward is not None and last is not None else None
    row = passes.get("both") or passes["forward"]
    return Times(forward, backward, row["wall"], row["host"])


def gpu_seconds(row: Row | None) -> float | None:
    return row["gpu_warm"][1] if row and "gpu_warm" in row else None


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else significant(1e6 * seconds)


def ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"


def name_of(work: Row) -> str:
    dropout = f", dropout {work['dropout']}" if work["dropout"] else ""
    return f"{work['case']}, batch {work['batch']}, {work['dtype']}{dropout}"


def peers(contenders: dict[str, Times]) -> dict[str, Times]:
    """Those of others: the names of other ways of this package begin with its own."""
    return {name: times for name, times in contenders.items() if not name.startswith(OURS)}


def best(contenders: dict[str, Times], of: Callable[[Times], float | None]) -> tuple[str, float] | None:
    """The fastest peer."""
    known = [(of(times), name) for name, times in peers(contenders).items() if of(times) is not None]
    return (min(known)[1], min(known)[0]) if known else None


def floors(work: Row) -> tuple[float | None, float | None]:
    """On paper, for forward and backward; of the sizes that roofline.py has."""
    wide = "900" in work["case"] or "coder" in work["case"]
    setting = roofline.Setting("DINO" if wide else "Conditional DETR", 900 if wide else 300, work["batch"])
    if work["dtype"] == "bfloat16" and work["work"] == "grouped_attention" and work["case"].startswith("K11"):
        dropout = work["dropout"] or 0.0
        return tuple(roofline.attention(setting, backward, dropout).seconds for backward in (False, True))
    if work["work"] == "linear_assignment" and work["case"].endswith("x20"):
        return roofline.linear_assignment(setting).seconds, None
    if work["work"] == "matching_cost":
        return roofline.matching_cost(setting).seconds, None
    queries = {"encoder": setting.pixels, "decoder9900": setting.length}.get(work["case"].partition(" ")[0])
    if work["dtype"] == "bfloat16" and work["work"] == "ms_deform_attn" and queries:
        return tuple(roofline.deformable(setting, queries, backward).seconds for backward in (False, True))
    return None, None


def short_table(run: Run) -> str:
    """Ours and the best peer of each pass."""
    header = ["work", "forward, µs", "floor", "best peer", "times ours"]
    header += ["backward, µs", "floor", "best peer", "times ours", "eager, µs", "best peer", "times ours", "host, µs"]
    lines = []
    for work, contenders in works(run):
        ours = contenders.get(OURS)
        if ours is None or not peers(contenders):
            continue
        line = [f"{work['work']}: {name_of(work)}"]
        parts = ("forward", "backward", "wall") if ours.forward is not None else (None, None, "wall")
        for part, floor in zip(parts, (*floors(work), None), strict=True):
            seconds = getattr(ours, part) if part else None
            line.append(microseconds(seconds))
            if part != "wall":
                line.append(microseconds(floor) if seconds is not None else "-")
            fastest = best(contenders, lambda times, part=part: getattr(times, part)) if part and seconds else None
            line += [fastest[0], ratio(fastest[1], seconds)] if fastest else ["-", "-"]
        lines.append([*line, microseconds(ours.host)])
    return table(header, lines)


def full_tables(run: Run) -> Iterator[str]:
    """Every contender of every work."""
    header = [
        "contender",
        "forward, µs",
        "times ours",
        "backward, µs",
        "times ours",
        "eager, µs",
        "times ours",
        "host, µs",
    ]
    for work, contenders in works(run):
        ours = contenders.get(OURS)
        lines = []
        for name, times in contenders.items():
            line = [name]
            for part in ("forward", "backward", "wall"):
                line += [microseconds(getattr(times, part)), ratio(getattr(times, part), ours and getattr(ours, part))]
            lines.append([*line, microseconds(times.host)])
        yield f"### {work['work']}: {name_of(work)}\n\n{table(header, lines)}"


# --- Goals ---


def find(runs: Sequence[Run], name: str, peer: str, **fields: Any) -> dict[str, Times]:
    """The newest contenders of a work, this peer among them; nothing if it was not timed."""
    for run in reversed(runs):
        for work, contenders in works(run):
            fits = work["work"] == name and all(work[field] == value for field, value in fields.items())
            if fits and any(contender.startswith(peer) for contender in contenders):
                return contenders
    return {}


def compare(contenders: dict[str, Times], part: str, like: str = "") -> float | None:
    """The best time of the peers whose names begin so, over ours."""
    ours = contenders.get(OURS)
    chosen = {name: times for name, times in contenders.items() if name == OURS or name.startswith(like)}
    fastest = best(chosen, lambda times: getattr(times, part))
    own = ours and getattr(ours, part)
    return fastest[1] / own if fastest and own else None


def goals_table(smoke: Run, ops: Sequence[Run], steps: Sequence[Run]) -> str:
    """The goals of the package on a GPU, and what was measured."""
    attention = {"case": "K11xN300", "batch": 2, "dtype": "bfloat16"}
    plain, dropped = (find(ops, "grouped_attention", "folded", **attention, dropout=p) for p in (0.0, 0.1))
    flex = find(ops, "grouped_attention", "FlexAttention", **attention, dropout=0.0)
    crossing = find(ops, "cross_attention", "SDPA", case="L3300xS1050", batch=2, dtype="bfloat16", dropout=0.0)
    encoder = find(ops, "ms_deform_attn", "deformops", case="encoder near", batch=2, dtype="bfloat16")
    compiled = {name: times for name, times in encoder.items() if name != "grid_sample"}
    assignment = find(ops, "linear_assignment", "torch-linear-assignment", case="132x300x20")
    criterion = find(ops, "criterion", "", case="132x300x20")
    wrong = [row for row in smoke.rows if row["status"] == "wrong"]
    errors = [max(row["error_over_allowed"].values()) for row in smoke.of("operator")]
    at_least = [
        (
            "grouped attention 11 x 300 forward, GPU, over the best folded SDPA",
            compare(plain, "forward", "folded"),
            1.2,
        ),
        ("its backward", compare(plain, "backward", "folded"), 1.0),
        ("both, over FlexAttention's mask", compare(wholes(flex), "forward", "Flex"), 5),
        ("with dropout 0.1, both, over folded SDPA", compare(wholes(dropped), "forward", "folded"), 1.2),
        ("attention of 3300 queries to padded images, both, over torch's", compare(wholes(crossing), "forward"), 1.5),
        (
            "deformable attention, encoder, both, GPU, over the best compiled peer",
            compare(wholes(compiled), "forward"),
            1.5,
        ),
        (
            "assignment, 132 problems of 300 x 20, eager, over torch-linear-assignment",
            compare({k: v for k, v in assignment.items() if "no checks" not in k}, "wall", "torch-linear-assignment"),
            5,
        ),
        ("criterion with backward, eager, over transformers", compare(criterion, "wall", "transformers"), 8),
        ("the same, over RF-DETR", compare(criterion, "wall", "rfdetr"), 4),
    ]
    many = {"model": "conditional_detr_r50", "groups": 11, "batch": 2}
    over_eager = value_of(steps, "step", "ratio", **many, contender="CUDA graph", ratio_to=f"{OURS}, K = 11")
    busy = value_of(steps, "kernels", "gpu_busy_unprofiled", **many, contender="CUDA graph")
    at_least += [
        ("step of K = 11 as a CUDA graph, batch 2, over the eager step", 1 / over_eager if over_eager else None, 1.5),
        ("share of time in which the GPU works in it", busy, 0.95),
    ]
    lines = [["largest error of an op over what is allowed", "at most 1", f"{max(errors):.2f}", met(not wrong)]]
    lines += [goal_line(name, f"at least {goal:g}", value, lambda v, g=goal: v >= g) for name, value, goal in at_least]
    syncs = value_of(steps, "syncs", "count", **many, contender=OURS, work="criterion")
    lines.append(["host synchronisations of the criterion", "0", str(syncs), met(syncs == 0)])
    to_one = {"contender": OURS, "ratio_to": f"{OURS}, K = 1"}
    graph_to_one = {"contender": "CUDA graph", "ratio_to": "CUDA graph, K = 1"}
    at_most = [
        ("eager step of K = 11 over K = 1, batch 2", value_of(steps, "step", "ratio", **many, **to_one), 1.22),
        ("the same as CUDA graphs", value_of(steps, "step", "ratio", **many, **graph_to_one), 1.22),
        (
            "peak memory of K = 11, one group a pass, over K = 1",
            value_of(steps, "memory", "ratio", **many, contender="groups_per_pass=1"),
            1.15,
        ),
    ]
    lines += [goal_line(name, f"at most {goal:g}", value, lambda v, g=goal: v <= g) for name, value, goal in at_most]
    return table(["goal", "", "measured", ""], lines)


def goal_line(name: str, goal: str, value: float | None, is_met: Callable[[float], bool]) -> list[str]:
    if value is None:
        return [name, goal, "not measured", "-"]
    rounded = (f"{value:.{digits}f}" for digits in itertools.count(2))
    return [name, goal, next(text for text in rounded if is_met(float(text)) == is_met(value)), met(is_met(value))]


def value_of(runs: Sequence[Run], kind: str, value: str, **fields: Any) -> Any:
    """A value of the newest row of a kind with these fields; None if there is none."""
    for run in reversed(runs):
        for row in run.of(kind, **fields):
            if value in row:
                return row[value]
    return None


def wholes(contenders: dict[str, Times]) -> dict[str, Times]:
    return {name: whole(times) for name, times in contenders.items()}


def whole(times: Times) -> Times:
    """Forward and backward together, in the place of forward."""
    known = times.forward is not None and times.backward is not None
    return times._replace(forward=times.forward + times.backward if known else None)


def met(good: bool) -> str:
    return "met" if good else "missed"


# --- The other stages ---


def smoke_table(run: Run) -> str:
    """The largest error over what is allowed, by operator and precision."""
    largest: dict[str, dict[str, float]] = {}
    for row in run.of("operator"):
        by_precision = largest.setdefault(row["operator"], {})
        error = max(row["error_over_allowed"].values())
        by_precision[row["precision"]] = max(error, by_precision.get(row["precision"], 0.0))
    precisions = list(dict.fromkeys(precision for errors in largest.values() for precision in errors))
    rows = [
        [operator, *(f"{errors[each]:.2f}" if each in errors else "-" for each in precisions)]
        for operator, errors in largest.items()
    ]
    return table(["error over allowed", *precisions], rows)


def step_table(run: Run) -> str:
    """Whole steps, and what became of them with others' parts."""
    lines = []
    for row in run.of("step"):
        quartiles = f"{1e3 * row['wall_q1']:.1f} to {1e3 * row['wall_q3']:.1f}"
        line = [row["model"], str(row["batch"]), str(row["groups"]), row["contender"]]
        line += [f"{1e3 * row['wall']:.1f} ({quartiles})", f"{1e3 * row['host']:.1f}"]
        lines.append([*line, f"{row['ratio']:.2f} of {row['ratio_to']}" if "ratio" in row else ""])
    return table(["detector", "batch", "K", "contender", "step, ms (quartiles)", "host, ms", "ratio"], lines)


def memory_table(run: Run) -> str:
    lines = [
        [
            row["model"],
            str(row["batch"]),
            str(row["groups"]),
            row["contender"],
            f"{row['bytes'] / 2**20:.0f}",
            ratio_in(row),
        ]
        for row in run.of("memory")
    ]
    return table(["detector", "batch", "K", "contender", "peak beyond weights, MiB", "over K = 1"], lines)


def ratio_in(row: Row) -> str:
    return f"{row['ratio']:.2f}" if "ratio" in row else ""


def busy_table(run: Run) -> str:
    """What the GPU does in a step, and how often the host waits for it."""
    lines = []
    for row in run.of("kernels"):
        waits = run.of("syncs", model=row["model"], groups=row["groups"], contender=row["contender"], work="step")
        count = str(waits[0]["count"]) if waits else "-"
        share = f"{100 * row['gpu_busy_unprofiled']:.0f} %" if "gpu_busy_unprofiled" in row else "-"
        first = row["most"][0]
        line = [row["model"], str(row["batch"]), str(row["groups"]), row["contender"]]
        line += [f"{1e3 * row['seconds']:.1f}", share]
        line += [f"{row['launches']:.0f}", count, f"{short_name(first['name'])}: {1e3 * first['seconds']:.2f} ms"]
        lines.append(line)
    header = ["detector", "batch", "K", "contender", "GPU at work, ms", "of the step", "kernels", "host waits"]
    return table([*header, "costliest kernel"], lines)


def short_name(kernel: str) -> str:
    """Without C++'s namespaces and arguments."""
    return kernel.removeprefix("void ").partition("<")[0].rpartition("::")[2][:40]


def tiles_table(run: Run) -> str:
    lines = [
        [
            row["kernel"],
            row["size"],
            str(row["batch"]),
            f"{row['block']} x {row['step']}, {row['warps']} warps, {row['stages']} stages",
            f"{row['over_default']:.2f}",
            str(row["tiles"]),
        ]
        for row in run.of("best_tile")
    ]
    return table(["kernel", "size", "batch", "fastest tile", "its time over the tile before", "of so many"], lines)


def tests_sentence(run: Run) -> str:
    """How many tests passed and failed, and of each test that failed, with whichever parameters, the first reason."""
    (row,) = run.of("tests")
    of_test: dict[str, list[str]] = {}
    for failed in run.rows:
        if failed["kind"] == "test":
            of_test.setdefault(failed["test"].partition("[")[0], []).append(failed["note"])
    reasons = "; ".join(f"{len(notes)} of `{test}` ({notes[0]})" for test, notes in of_test.items())
    counts = f"{row['passed']} passed, {row['failed']} failed, in {row['seconds']:.0f} s"
    counts += f"; {row['out_of_time']} did not begin in time" if row.get("out_of_time") else ""
    return f"{counts}." + (f" Failed: {reasons}." if reasons else "")


def sanitizer_sentence(run: Run) -> str:
    return "; ".join(f"{row['tool']}: {row['summary']}" for row in run.of("sanitizer")) + "."


# --- Documents ---


NOTHING = "Not yet measured on a GPU."


def goals(folder: Path) -> str:
    smokes, ops, steps = (runs_of(folder, stage) for stage in ("smoke", "ops", "step"))
    if not (smokes and ops and steps):
        return NOTHING
    origins = dict.fromkeys(origin(run) for run in (smokes[-1], *ops, *steps))
    return "\n\n".join((" ".join(origins), goals_table(smokes[-1], ops, steps)))


def parts(folder: Path, full: bool) -> Iterable[str]:
    """The tables in order; those of stages without a run are left out."""
    smokes, ops, steps, tests, tunes = (runs_of(folder, stage) for stage in STAGES)
    for smoke in smokes[-1:]:
        ceilings = [f"{row['of']} {significant(row['value'] / 1e12)}e12 {row['unit']}" for row in smoke.of("ceiling")]
        found = f"{origin(smoke)} Ceilings: {'; '.join(ceilings)}."
        yield f"## Every op against float64\n\n{found}\n\n{smoke_table(smoke)}"
    for test in tests[-1:]:
        yield f"## Tests marked gpu\n\n{origin(test)} {tests_sentence(test)}"
    if ops:
        yield "## Ops against the best peer"
    for run in newest_works(ops):
        yield f"{origin(run)}\n\n{short_table(run)}"
        if full:
            yield from full_tables(run)
    if steps:
        yield "## Training steps, 800 x 1333, bf16"
    for run in steps:
        yield f"{origin(run)}\n\n{step_table(run)}"
        for kind, tabulate in (("kernels", busy_table), ("memory", memory_table)):
            if run.of(kind):
                yield tabulate(run)
    for tune in tunes[-1:]:
        yield f"## Tiles\n\n{origin(tune)} {sanitizer_sentence(tune)}\n\n{tiles_table(tune)}"


def document(folder: Path, full: bool = False) -> str:
    return "\n\n".join(parts(folder, full)) or NOTHING


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROWS, help="folder of the rows")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write report.md and the sections of the documents")
    action.add_argument("--check", action="store_true", help="fail if the documents have other tables")
    options = parser.parse_args(arguments)
    sections = [(PERFORMANCE, GOALS_SECTION, goals(options.results)), (ON_A_GPU, SECTION, document(options.results))]
    report = f"# GPU report\n\n## Goals\n\n{goals(options.results)}\n\n{document(options.results, full=True)}\n"
    if options.write:
        for page, name, text in sections:
            write_section(page, name, text)
        (options.results / "report.md").write_text(report)
    elif options.check:
        for page, name, text in sections:
            if read_section(page, name) != text:
                sys.exit(f"{page} has other tables: run python {sys.argv[0]} --write")
    else:
        print(report)
