"""Prediction in a folder: images as they come, those of similar size together, and read ahead besides.

    OMP_NUM_THREADS=1 python benchmarks predict_folder --images DIR [--rounds 5] [--write]

Three ways, which take turns: "in order" reads every image when its batch is due; "by size" also reads when an image is
due, and lets images of similar size share a batch; "read ahead" does both, with threads, which is what ``gd.predict``
does. Two detectors: a Conditional DETR R50, in which the model takes nearly all the time, and the same with a backbone
of a few channels, in which reading has a large part of it, as beside a GPU. Detections of the three ways are compared
first. Padding is what a batch has beside its images.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import groupdetr_fast as gd
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.data.images import IMAGE_SUFFIXES
from groupdetr_fast.prediction import InferenceSettings
from harness.documents import ON_CPUS, table, write_section
from harness.results import processor

__all__ = ["DETECTORS", "rows", "ways_to_predict"]

BATCH_SIZE = 4
IN_ORDER, BY_SIZE, AHEAD = "in order", "by size", "read ahead"
LIGHT = {"backbone": "conv:8-16-16-16", "encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "dim_feedforward": 64}

# name: settings of the detector, short side and limit on the long side of the images
DETECTORS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "Conditional DETR R50": ({}, (256, 427)),
    "light backbone": ({**LIGHT, "num_heads": 4, "num_queries": 100}, (256, 427)),
}


class Counted(nn.Module):
    """A detector that counts the pixels that it is given, and those that are padding."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config
        self.pixels = self.padding = 0

    def forward(self, images: Tensor, masks: Tensor) -> Any:
        self.pixels, self.padding = self.pixels + masks.numel(), self.padding + int(masks.sum())
        return self.model(images, masks)


def build(name: str) -> tuple[Counted, InferenceSettings]:
    """A detector with random weights, and the sizes of its images."""
    torch.manual_seed(0)
    settings, (short, long) = DETECTORS[name]
    model = gd.build_model("conditional_detr_r50", num_classes=91, num_groups=1, backbone_weights=None, **settings)
    sizes = AugmentationConfig(eval_short_side=short, eval_max_size=long)
    return Counted(model.eval()), InferenceSettings(augmentation=sizes)


def ways_to_predict(
    model: nn.Module, settings: InferenceSettings, paths: Sequence[Path]
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Each way as a function that returns the detections of all images, in their order."""
    common = {"batch_size": BATCH_SIZE, "settings": settings, "score_threshold": 0.0, "top_k": 20}

    def in_order() -> list[dict[str, Any]]:
        found = []
        remaining = iter(paths)
        while part := list(itertools.islice(remaining, BATCH_SIZE)):  # no image waits for those of other batches
            found += gd.predict(model, part, workers=0, **common)
        return found

    return {
        IN_ORDER: in_order,
        BY_SIZE: lambda: gd.predict(model, paths, workers=0, **common),
        AHEAD: lambda: gd.predict(model, paths, **common),
    }


def compare(found: dict[str, list[dict[str, Any]]], tolerance: float) -> None:
    """Raises AssertionError unless the scores are the same but for what padding does to them."""
    for one, *others in zip(*found.values(), strict=True):
        for other in others:
            torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=tolerance)


def rows(paths: Sequence[Path], rounds: int) -> list[list[str]]:
    """Of each detector and way: images a second, the ratio to the first way within a round, padding."""
    result = []
    for name in DETECTORS:
        model, settings = build(name)
        ways = ways_to_predict(model, settings, paths)
        found, padding = {}, {}
        for way, run in ways.items():  # which is the warm-up, too
            model.pixels = model.padding = 0
            found[way] = run()
            padding[way] = model.padding / model.pixels
        compare(found, tolerance=0.02)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            order = list(ways)
            for way in order[number % 3 :] + order[: number % 3]:
                begin = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - begin)
        for way, times in seconds.items():
            rate = len(paths) / statistics.median(times)
            ratios = sorted(first / here for first, here in zip(seconds[IN_ORDER], times, strict=True))
            shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            result.append([name, way, f"{rate:.2f}", shown, f"{100 * padding[way]:.0f} %"])
    return result


def text(paths: Sequence[Path], rounds: int) -> str:
    """What is printed."""
    header = ["detector", "batches", "images/s", "times as fast as in order", "padding"]
    where = f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
    what = f"{len(paths)} images, batches of {BATCH_SIZE}, {rounds} rounds"
    how = "the ratio is the median of those within a round, beside the least and the largest"
    return f"{where}; {what}; {how}.\n\n{table(header, rows(paths, rounds))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, of several sizes")
    parser.add_argument("--most", type=int, default=64, help="images, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"put the table into {ON_CPUS.name}")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        parser.error(f"there are no images in {arguments.images}")
    printed = text(paths[: arguments.most], arguments.rounds)
    if arguments.write:
        write_section(ON_CPUS, "predict_folder", printed)
    else:
        print(printed)
