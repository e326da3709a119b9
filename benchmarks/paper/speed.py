"""One picture of how fast this package is, for the first page: from the rows that make bench and gpu_report.py wrote.

python benchmarks speed            print the ratios
python benchmarks speed --write    and draw docs/images/speed.png
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

from cpu.summary import ATTENTION, ENCODER, MANY_GROUPS, ONE_GROUP, SavedResults
from cpu.summary import ratio as time_ratio
from gpu.tables import ROWS, Run, compare, find, runs_of, value_of, wholes
from harness import cases
from harness.documents import table
from harness.places import DOCS, RESULTS
from harness.results import OURS

PICTURE = DOCS / "images" / "speed.png"


class Bar(NamedTuple):
    """How many times as long ``against`` takes for ``work``."""

    work: str
    against: str
    times: float


def gpu_bars(folder: Path) -> Iterator[Bar]:
    """Of the newest rows of each work, 2 images."""
    ops, steps = (runs_of(folder, stage) for stage in ("ops", "step"))
    attention = {"case": "K11xN300", "batch": 2, "dtype": "bfloat16", "dropout": 0.0}
    folded, flex = (find(ops, "grouped_attention", peer, **attention) for peer in ("folded", "FlexAttention"))
    near = {"case": "encoder near", "batch": 2, "dtype": "bfloat16"}
    encoder, original = (find(ops, "ms_deform_attn", peer, **near) for peer in ("deformops", "torch-ms-deform-attn"))
    crossing = find(ops, "cross_attention", "SDPA", **(attention | {"case": "L3300xS1050"}))
    criterion = find(ops, "criterion", "", case="132x300x20")
    assignment = find(ops, "linear_assignment", "torch-linear-assignment", case="132x300x20")
    step = {"model": "conditional_detr_r50", "groups": 11, "batch": 2}
    graph = value_of(steps, "step", "ratio", **step, contender="CUDA graph", ratio_to=f"{OURS}, K = 11")
    bars = (
        ("attention in 11 groups of 300", "FlexAttention, mask of groups", compare(wholes(flex), "forward", "Flex")),
        ("attention in 11 groups of 300", "groups folded into the batch", compare(wholes(folded), "forward", "folded")),
        ("the same, one eager call", "groups folded into the batch", compare(folded, "wall", "folded")),
        ("attention of 3300 queries to padded images", "torch's under a mask", compare(wholes(crossing), "forward")),
        ("deformable attention, encoder", "the original's kernels", compare(wholes(original), "forward", "torch-ms")),
        ("deformable attention, encoder", "deformops, Triton", compare(wholes(encoder), "forward", "deformops")),
        ("assignment, 20 objects", "torch-linear-assignment", compare(assignment, "wall", "torch-linear-assignment")),
        ("matching and losses, 20 objects", "transformers", compare(criterion, "wall", "transformers")),
        ("matching and losses, 20 objects", "RF-DETR", compare(criterion, "wall", "rfdetr")),
        ("training step, 11 groups, as a CUDA graph", "the same step, kernel by kernel", graph and 1 / graph),
    )
    return (Bar(*bar) for bar in bars if bar[2] is not None)


def cpu_bars(folder: Path) -> Iterator[Bar]:
    """Of what was measured."""
    results = SavedResults(folder)
    objects = cases.Matching(20)
    bars = (
        ("attention in 11 groups of 300", "grouped_attention", ATTENTION, "masked SDPA", "a mask of groups"),
        (
            "attention in 11 groups of 300",
            "grouped_attention",
            ATTENTION,
            "folded SDPA",
            "groups folded into the batch",
        ),
        ("deformable attention, encoder", "ms_deform_attn", ENCODER, "grid_sample", "grid_sample"),
        ("deformable attention, encoder", "ms_deform_attn", ENCODER, "torch-ms-deform-attn", "torch-ms-deform-attn"),
        ("assignment, 20 objects", "linear_assignment", objects, "scipy", "scipy"),
        ("matching and losses, 20 objects", "criterion", objects, "transformers", "transformers"),
        ("matching and losses, 20 objects", "criterion", objects, "rfdetr", "RF-DETR"),
        ("training step, 1 group", "training_step", ONE_GROUP, "transformers", "transformers"),
        ("training step, 11 groups", "training_step_with_groups", MANY_GROUPS, "masked SDPA", "a mask of groups"),
    )
    for work, comparison, case, contender, against in bars:
        with contextlib.suppress(LookupError):
            yield Bar(work, against, time_ratio(comparison, case, contender)(results).median)


def gpu_name(steps: list[Run]) -> str:
    return str(steps[0].environment["device"]) if steps else "GPU"


def draw(panels: dict[str, list[Bar]], path: Path) -> None:
    """A panel for each device, the bars of a work beside each other."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(12, 4.2), layout="constrained", squeeze=False)
    for axes, (title, bars) in zip(all_axes[0], panels.items(), strict=True):
        labels = [f"{bar.work}\nagainst {bar.against}" for bar in bars]
        colors = ["tab:blue" if bar.times >= 1 else "tab:red" for bar in bars]
        drawn = axes.barh(range(len(bars)), [bar.times - 1 for bar in bars], left=1, color=colors)
        axes.bar_label(drawn, [f" {bar.times:.1f} " for bar in bars], fontsize=9)
        axes.set_yticks(range(len(bars)), labels, fontsize=8)
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(0.4, 2 * max(bar.times for bar in bars))
        axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("times as fast (log scale; left of 1 the other one is faster)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of csv files")
    parser.add_argument("--gpu-results", type=Path, default=ROWS, help="folder of the rows of a GPU")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=PICTURE, help=f"draw the picture (default: {PICTURE.name})"
    )
    options = parser.parse_args(arguments)
    panels = {
        gpu_name(runs_of(options.gpu_results, "step")): list(gpu_bars(options.gpu_results)),
        "two CPU cores": list(cpu_bars(options.results)),
    }
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        parser.error("nothing was measured: run make bench, or gpu_report.py on a machine with a GPU")
    for title, bars in panels.items():
        rows = [[bar.work, bar.against, f"{bar.times:.2f}"] for bar in bars]
        print(f"{title}\n\n{table(['work', 'against', 'times as fast'], rows)}\n")
    if options.write is not None:
        draw(panels, options.write)


if __name__ == "__main__":
    main()
