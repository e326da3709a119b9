"""Evaluate a detector on COCO-format data."""

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from ..data import CocoDataset
from ..evaluation.coco import CocoEvaluator, format_table
from ..evaluation.detections import CollectedDetections
from ..evaluation.visualize import draw_detections
from ..files import write_json, write_whole
from ..models import postprocess
from ..models.checkpoints import CheckpointMismatch, read_header
from ..prediction import class_table
from ..random_state import random_state_kept
from ..training.engine import build_accelerator
from ..training.processes import on_main_process
from .config import CocoTrainingConfig
from .loaders import evaluation_batch_size, evaluation_loader, evaluation_set

__all__ = ["evaluate", "evaluate_checkpoint", "rehearse_evaluation"]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
LONGEST_NAME = 40  # characters of a category that are printed
SECONDS_BETWEEN_LINES = 15
REHEARSED_BATCHES = 2  # of each process
PICTURE_THRESHOLD = 0.3  # focal loss keeps the scores of right detections well below 1


def evaluate_checkpoint(config: CocoTrainingConfig) -> dict[str, Any]:
    """Evaluate the weights of ``config.model.load``, and print their COCO table.

    Args:
        config: the run; what concerns training alone, such as the data to train on, is not needed.

    Returns:
        The metrics, under the names that ``results.json`` of a training has for an epoch's.

    Raises:
        DataError: for a fault in the data; the sentence names the file or the id.
        ValueError: for settings that do not fit together, and if there are no weights to evaluate.
    """
    if config.model.load is None:
        raise ValueError("there is nothing to evaluate but random weights: give load, a checkpoint")
    config.output.mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(config.optimization.resolved(), config.output)
    dataset = evaluation_set(config)
    model = _build(config, dataset)
    loader = accelerator.prepare(evaluation_loader(dataset, config))
    _compare_categories(config.model.load, dataset)
    metrics = evaluate(accelerator, accelerator.prepare_model(model, evaluation_mode=True), loader, dataset, config)
    if accelerator.is_main_process:
        write_json(config.output / METRICS_FILE, metrics)
        print(format_table(metrics))
        print(_per_category(metrics["per_category"]))
        print(f"results: {config.output}")
    return metrics


def _build(config: CocoTrainingConfig, dataset: CocoDataset) -> nn.Module:
    try:
        return config.model.build(dataset.num_classes)
    except CheckpointMismatch as error:
        if error.classes is None or config.model.new_class_head:
            raise
        raise ValueError(  # a new class head, which a training would be advised to take, has nothing to be evaluated
            f"{config.model.load} has a class head of {error.classes[0]} rows, and {dataset.annotation_file} needs "
            f'{error.classes[1]} with labels="{config.data.labels}": evaluate on data with the classes of its training'
        ) from None


def _per_category(aps: dict[str, float | None]) -> str:
    """AP by category, best first; those without objects are left out."""
    known = sorted(((ap, name) for name, ap in aps.items() if ap is not None), reverse=True)
    return " AP by category: " + ", ".join(f"{name[:LONGEST_NAME]} {ap:.3f}" for ap, name in known)


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    dataset: CocoDataset,
    config: CocoTrainingConfig,
    between_batches: Callable[[], None] = lambda: None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """COCO metrics of a model, the same in every process.

    The main process computes them, and writes ``detections.json`` and ``predictions.png`` into the folder of the run.

    Args:
        accelerator, model, loader: the loader and the model as the accelerator prepared them.
        dataset: of the loader.
        config: the run.
        between_batches: called after every batch, in all processes as many times; may raise.
        say: what the main process shows lines with about how far it is, now and then; None for the terminal's stderr.
    """
    detections = CollectedDetections(dataset.category_ids)
    progress = _Progress(len(dataset), accelerator, say or Console(stderr=True).print)

    def after_batch(images: int) -> None:
        progress.advance(images)
        between_batches()

    shown = _detect(model, loader, detections, config, set(dataset.image_ids[: config.pictures]), after_batch)
    states = gather_object([detections.by_image])

    def summarize() -> dict[str, Any]:
        evaluator = _evaluator(dataset, config)
        evaluator.merge(states)
        metrics = evaluator.summarize()
        write_whole(config.output / "detections.json", _as_json(evaluator))
        _draw(dataset, shown, config)
        return metrics

    # Two processes have seen an image that fills a last batch, padded differently: each would have metrics of its own.
    return on_main_process(accelerator, summarize)


def rehearse_evaluation(
    accelerator: Accelerator, model: nn.Module, dataset: CocoDataset, config: CocoTrainingConfig
) -> None:
    """Evaluate two batches of each process and forget the result: what would fail after an epoch fails now.

    Raises:
        DataError: for a fault in the data; the sentence names the file or the id.
    """
    images = REHEARSED_BATCHES * evaluation_batch_size(config) * accelerator.num_processes
    config = replace(config, data=replace(config.data, workers=0))
    loader = accelerator.prepare(evaluation_loader(dataset, config, images=images))
    detections = CollectedDetections(dataset.category_ids)
    with random_state_kept():
        _detect(model, loader, detections, config)

    def summarize() -> None:
        evaluator = _evaluator(dataset, config, image_ids=dataset.image_ids[:images])
        evaluator.merge([detections.by_image])
        evaluator.summarize()

    on_main_process(accelerator, summarize)


def _evaluator(
    dataset: CocoDataset, config: CocoTrainingConfig, image_ids: Sequence[int] | None = None
) -> CocoEvaluator:
    iou_type = "segm" if config.model.predicts_masks else "bbox"
    return CocoEvaluator(dataset.annotation_file, iou_type, category_ids=dataset.category_ids, image_ids=image_ids)


@torch.no_grad()
def _detect(
    model: nn.Module,
    loader: DataLoader,
    collected: CollectedDetections,
    config: CocoTrainingConfig,
    show: Collection[int] = (),
    after_batch: Callable[[int], None] = lambda images: None,
) -> dict[int, dict[str, torch.Tensor]]:
    """Collect the detections of a loader's images. Returns those of the images to show, by id.

    Args:
        after_batch: called with the number of its images.
    """
    model.eval()
    shown: dict[int, dict[str, torch.Tensor]] = {}
    for batch in loader:
        detections = postprocess(model(batch.images, batch.masks), batch.original_sizes, top_k=config.top_k)
        for image_id, detection in zip(batch.image_ids, detections, strict=True):
            collected.add(image_id, detection)
            if image_id in show:
                shown[image_id] = {name: value.cpu() for name, value in detection.items()}
        after_batch(len(batch))
    return shown


def _as_json(evaluator: CocoEvaluator) -> str:
    """The detections in COCO's result format, without all of them as Python objects at once."""
    images = (json.dumps(results)[1:-1] for results in evaluator.results_by_image())
    return f"[{', '.join(filter(None, images))}]\n"


class _Progress:
    """Lines about how far an evaluation is, of the main process; none of a short one.

    Args:
        total: images, of all processes.
        accelerator: of the evaluation.
        say: shows a line.
    """

    def __init__(self, total: int, accelerator: Accelerator, say: Callable[[str], None]):
        self.total = total
        self.accelerator = accelerator
        self.say = say
        self.done = 0
        self.begin = self.said = time.monotonic()

    def advance(self, images: int) -> None:
        """So many more images are done in this process, and about as many in each other one."""
        self.done = min(self.total, self.done + images * self.accelerator.num_processes)
        now = time.monotonic()
        if not self.accelerator.is_main_process or now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said, rate = now, self.done / (now - self.begin)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        self.say(f"evaluated {self.done}/{self.total} images  {rate:.1f} images/s  {left} left")


def _compare_categories(checkpoint: Path | None, val_set: CocoDataset) -> None:
    """Warn if a checkpoint was trained on other classes than those that it is evaluated on."""
    categories = [] if checkpoint is None else read_header(checkpoint).categories
    trained, evaluated = (
        {entry["id"]: str(entry["name"]) for entry in each} for each in (categories, val_set.categories)
    )
    if categories and trained != evaluated:
        differing = sorted(trained.items() ^ evaluated.items())[0]
        logger.warning(
            "%s was trained on other categories than those of %s (id %d, %r, is in one only): "
            "its classes may mean others",
            checkpoint,
            val_set.annotation_file,
            *differing,
        )


def _draw(dataset: CocoDataset, detections: dict[int, dict[str, torch.Tensor]], config: CocoTrainingConfig) -> None:
    """Write ``predictions.png`` for the first images, of those that this process evaluated."""
    indices = [index for index in range(min(config.pictures, len(dataset))) if dataset.image_ids[index] in detections]
    if not indices:
        return
    draw_detections(
        [dataset.image(index) for index in indices],
        [dataset.ground_truth(index) for index in indices],
        [detections[dataset.image_ids[index]] for index in indices],
        class_table(dataset.categories, config.data.labels)[0],
        config.output / "predictions.png",
        score_threshold=PICTURE_THRESHOLD,
    )
