"""What a training waits for at the size of COCO besides the device: images, its start, the metric.

    python benchmarks coco_size                     make the data if they are not there, measure, and append rows
    python benchmarks coco_size --only images       one measurement
    python benchmarks coco_size --reduce 100        with the hundredth part of everything, to see that it works

Each case runs in a process of its own. Beside the seconds that passed, rows have the seconds of processors: on a
machine with other work these are what can be compared. Memory is resident memory at its peak less that before. The case
``start`` builds the data set of train2017 as every rank does, first with an empty cache and then with what this leaves.
"""

import argparse
import csv
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from groupdetr_fast.data.cache import cache_root
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.evaluation import CocoEvaluator
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.loaders import evaluation_set, training_loader, training_set
from groupdetr_fast.training.config import OptimizationConfig
from harness.commits import commit
from harness.memory import forget_peak, resident
from harness.places import RESULTS, ROOT, python_path
from harness.results import processor

from .coco_like import HEIGHT, WIDTH, coco_like

__all__ = ["COLUMNS", "MEASUREMENTS", "append_row", "measure"]

FILE = RESULTS / "coco_size.csv"
COLUMNS = (
    "measurement", "case", "unit", "count", "seconds", "cpu_seconds", "bytes", "cpu", "cores", "torch", "commit",
)  # fmt: skip

DETECTIONS = 100  # per image
IMAGES_OF_MASKS = 100  # of 5000: the masks of all take minutes
IMAGES_LOADED = 1000
BATCH = 2  # images, as in the paper


def _config(data: Path, **settings: Any) -> CocoTrainingConfig:
    return CocoTrainingConfig(
        data=DataConfig(data_path=data, **settings), optimization=OptimizationConfig(batch_size=BATCH)
    )


@contextmanager
def _measured(row: dict[str, Any]) -> Iterator[None]:
    """Inside, seconds, seconds of processors and memory are measured."""
    gc.collect()
    forget_peak()
    before, spent, begin = resident("VmRSS"), sum(os.times()[:4]), time.perf_counter()
    yield
    row |= {"seconds": time.perf_counter() - begin, "cpu_seconds": sum(os.times()[:4]) - spent}
    row["bytes"] = resident("VmHWM") - before


def images(data: Path, reduce: int) -> Iterator[dict[str, Any]]:
    """Images that one worker makes batches of, augmented for 800 x 1333 pixels.

    The seconds of processors are the worker's alone.
    """
    config = _config(data, workers=1)
    batches = iter(training_loader(training_set(config), config))
    for _ in range(5):
        next(batches)
    (worker,) = psutil.Process().children()
    count = max(BATCH, IMAGES_LOADED // reduce)
    row = {"case": "loaded by one worker", "unit": "images", "count": count}
    before = worker.cpu_times()
    with _measured(row):
        for _ in range(count // BATCH):
            next(batches)
    after = worker.cpu_times()
    row["cpu_seconds"] = after.user + after.system - before.user - before.system
    row["bytes"] = ""
    yield row


def start(data: Path, reduce: int, detector: str) -> Iterator[dict[str, Any]]:
    """The data set of a rank."""
    config = replace(_config(data), model=ModelConfig(model=detector))
    row = {"unit": "images"}
    with _measured(row):
        dataset = training_set(config)
    yield row | {"count": len(dataset)}


def metric(data: Path, reduce: int) -> Iterator[dict[str, Any]]:
    """Boxes of val2017: what an evaluation does from the detector's outputs to the twelve numbers."""
    config = _config(data)
    dataset = evaluation_set(config)
    rng = np.random.default_rng(0)
    predictions = [_detections(dataset.ground_truth(index), dataset.num_classes, rng) for index in range(len(dataset))]
    row = {"case": f"boxes, {DETECTIONS} detections an image", "unit": "images", "count": len(dataset)}
    with _measured(row):
        evaluator = _evaluator_of(dataset, "bbox")
        for image_id, prediction in zip(dataset.image_ids, predictions, strict=True):
            evaluator.update([image_id], [prediction])
        evaluator.summarize()
    yield row


def masks(data: Path, reduce: int) -> Iterator[dict[str, Any]]:
    """Masks of a part of val2017: run lengths of the detector's masks, and the metric of them, each by itself."""
    config = replace(_config(data), model=ModelConfig(model="mask2former_r50"))
    dataset = evaluation_set(config)
    rng = np.random.default_rng(0)
    count = min(len(dataset), IMAGES_OF_MASKS)
    ids = dataset.image_ids[:count]
    evaluator = _evaluator_of(dataset, "segm", image_ids=ids)
    encoding = {"case": f"encoding {DETECTIONS} masks an image", "unit": "images", "count": count}
    encoding |= {"seconds": 0.0, "cpu_seconds": 0.0, "bytes": 0}
    for index, image_id in enumerate(ids):
        prediction = _detections(dataset.ground_truth(index), dataset.num_classes, rng)
        prediction["masks"] = _ellipses(prediction["boxes"])
        row: dict[str, Any] = {}
        with _measured(row):
            evaluator.update([image_id], [prediction])
        for name in ("seconds", "cpu_seconds"):
            encoding[name] += row[name]
        encoding["bytes"] = max(encoding["bytes"], row["bytes"])
    yield encoding
    row = {"case": f"masks, {DETECTIONS} detections an image", "unit": "images", "count": count}
    with _measured(row):
        evaluator.summarize()
    yield row


# measurement: cases, each of which is measured in a process of its own by one of these functions; the rows that it
# makes have the case's name unless they have one of their own
BOXES, MASKS = (partial(start, detector=name) for name in ("conditional_detr_r50", "mask2former_r50"))
MEASUREMENTS: dict[str, dict[str, Callable[[Path, int], Iterator[dict[str, Any]]]]] = {
    "images": {"": images},
    "start": {
        "boxes, first time": BOXES,
        "boxes, later": BOXES,
        "masks, first time": MASKS,
        "masks, later": MASKS,
    },
    "metric": {"": metric},
    "masks": {"": masks},
}


def _evaluator_of(dataset: Any, iou_type: str, **settings: Any) -> CocoEvaluator:
    return CocoEvaluator(dataset.annotation_file, iou_type, category_ids=dataset.category_ids, **settings)


def _detections(truth: dict[str, torch.Tensor], num_classes: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """What postprocess returns for an image: its objects, not quite, and others, best first."""
    objects = min(len(truth["boxes"]), DETECTIONS)
    corners = rng.random((DETECTIONS, 2)) * (WIDTH, HEIGHT)
    boxes = np.concatenate((corners, corners + rng.exponential(60, (DETECTIONS, 2))), axis=1)
    boxes[:objects] = truth["boxes"].numpy()[:objects] + rng.normal(0, 3, (objects, 4))
    labels = rng.integers(0, num_classes, DETECTIONS)
    labels[:objects] = truth["labels"].numpy()[:objects]
    scores = rng.random(DETECTIONS) ** 3
    scores[:objects] += 0.2
    order = np.argsort(-scores)
    limits = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    return {
        "scores": torch.from_numpy(scores[order]).float(),
        "labels": torch.from_numpy(labels[order]),
        "boxes": torch.from_numpy(boxes[order].clip(0, limits)).float(),
    }


def _ellipses(boxes: torch.Tensor) -> torch.Tensor:
    """Masks ``[N, H, W]`` bool, a filled ellipse in each box."""
    rows, columns = torch.arange(HEIGHT)[:, None] + 0.5, torch.arange(WIDTH)[None] + 0.5
    centres, radii = (boxes[:, :2] + boxes[:, 2:]) / 2, ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp(min=0.5)
    across = (columns - centres[:, 0, None, None]) / radii[:, 0, None, None]
    down = (rows - centres[:, 1, None, None]) / radii[:, 1, None, None]
    return across**2 + down**2 <= 1


def measure(name: str, data: Path, cache: Path, reduce: int) -> Iterator[dict[str, Any]]:
    """The rows of one measurement."""
    path = python_path(ROOT / "benchmarks", ROOT)
    own = {"PYTHONPATH": path, "GROUPDETR_FAST_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    machine = {"cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit()}
    for case in MEASUREMENTS[name]:
        command = [sys.executable, "-m", "cpu.coco_size", "--measure", name, case, str(data), str(reduce)]
        process = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        if process.returncode != 0:
            raise RuntimeError(f"measuring {name} {case} failed:\n{process.stderr[-4000:]}")
        for line in process.stdout.splitlines():
            yield {"measurement": name, "case": case, **json.loads(line), **machine}


def _measure_here(name: str, case: str, data: str, reduce: str) -> None:
    torch.set_num_threads(1)
    for row in MEASUREMENTS[name][case](Path(data), int(reduce)):
        print(json.dumps(row), flush=True)


def append_row(row: dict[str, Any], file: Path) -> None:
    """Add a row to a csv file, which is begun if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    begins = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if begins:
            writer.writeheader()
        writer.writerow({**row, **{name: round(row[name], 3) for name in ("seconds", "cpu_seconds")}})


def _line(row: dict[str, Any]) -> str:
    rates = [f"{row['count'] / row[name]:.1f} {row['unit']}/s" for name in ("seconds", "cpu_seconds")]
    memory = f", {row['bytes'] / 2**20:.0f} MiB" if row["bytes"] != "" else ""
    return (
        f"{row['measurement']}: {row['case']}: {row['count']} {row['unit']} in {row['seconds']:.2f} s ({rates[0]}), "
        f"of processors {row['cpu_seconds']:.2f} s ({rates[1]}){memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_root(), help="where the data are made (%(default)s)")
    parser.add_argument("--photographs", type=Path, help="folder of jpegs to use, in place of generated pictures")
    parser.add_argument("--reduce", type=int, default=1, help="make and measure this part of everything only")
    parser.add_argument("--only", choices=MEASUREMENTS, help="one measurement")
    parser.add_argument("--rows", type=Path, default=FILE, help="csv file to append to (%(default)s)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        _measure_here(*arguments.measure)
        return
    data = coco_like(arguments.folder, arguments.photographs, arguments.reduce)
    cache = arguments.folder / "coco_size-cache"
    for name in MEASUREMENTS if arguments.only is None else [arguments.only]:
        if name == "start":
            shutil.rmtree(cache, ignore_errors=True)
        for row in measure(name, data, cache, arguments.reduce):
            append_row(row, arguments.rows)
            print(_line(row), flush=True)


if __name__ == "__main__":
    main()
