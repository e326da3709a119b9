"""Evaluate a detector on COCO-format data."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from ..data import Batch, CocoDataset
from ..data.categories import difference_in_words
from ..evaluation.coco import CocoEvaluator, format_table
from ..evaluation.detections import CollectedDetections
from ..evaluation.visualize import draw_detections
from ..files import write_json, write_whole
from ..models import postprocess
from ..models.checkpoints import CheckpointMismatch
from ..prediction import describe_model
from ..random_state import random_state_kept
from ..training.display import Display
from ..training.engine import build_accelerator
from ..training.faults import AGAIN, deaths_of_processes_explained, deaths_of_workers_explained
from ..training.processes import on_main_process
from .config import CocoTrainingConfig
from .folder import DETECTIONS, PREDICTIONS, holds_run
from .loaders import evaluation_batch_size, evaluation_loader, evaluation_samples, evaluation_set
from .report import write_report

__all__ = ["evaluate", "evaluate_checkpoint", "evaluator_of", "rehearse_evaluation", "warn_of_other_categories"]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
LONGEST_NAME = 40  # characters of a category that are printed
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
        TrainingError: if a process that loads images or another one that evaluates dies.
        ValueError: for settings that do not fit together, if there are no weights to evaluate, and for an output folder
            that holds a run, whose detections and page would be replaced.
    """
    if config.model.load is None:
        raise ValueError("there is nothing to evaluate but random weights: give load, a checkpoint")
    if holds_run(config.output):
        raise ValueError(
            f"{config.output} holds a run, whose detections and page an evaluation would replace: give another output, "
            f"such as --output {config.output / 'eval'}"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(config.optimization, config.output)
    dataset = evaluation_set(config)
    model = _build(config, dataset)
    samples = evaluation_samples(dataset, config, accelerator.device)
    loader = accelerator.prepare(evaluation_loader(samples, config))
    warn_of_other_categories(config, dataset, "its class numbers may mean other classes")
    model = accelerator.prepare_model(model, evaluation_mode=True)
    with deaths_of_workers_explained(loader.num_workers, AGAIN), deaths_of_processes_explained(AGAIN):
        metrics = evaluate(accelerator, model, loader, dataset, config)
    accelerator.end_training()
    if accelerator.is_main_process:
        write_json(config.output / METRICS_FILE, metrics)
        print(format_table(metrics))
        print(_per_category(metrics["per_category"]))
        if config.report and (page := write_report(config, dataset, metrics)):
            print(f"report: {page}")
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
    loader: DataLoader[Any],
    dataset: CocoDataset,
    config: CocoTrainingConfig,
    between_batches: Callable[[], None] = lambda: None,
    display: Display | None = None,
) -> dict[str, Any]:
    """COCO metrics of a model, the same in every process.

    The main process computes them, and writes ``detections.json`` and ``predictions.png`` into the folder of the run.

    Args:
        accelerator, model, loader: the loader and the model as the accelerator prepared them.
        dataset: of the loader.
        config: the run.
        between_batches: called after every batch, in all processes as many times; may raise.
        display: that of a training, whose bar is on the terminal; None for one of its own.
    """
    detections = CollectedDetections(dataset.category_ids)
    show = set(dataset.image_ids[: config.pictures])
    with closing((display or Display(accelerator)).evaluated(loader)) as batches:
        shown = _detect(model, batches, detections, config, show, between_batches)
    gathered = gather_object([(detections.by_image, shown)])

    def summarize() -> dict[str, Any]:
        evaluator = evaluator_of(dataset, config)
        evaluator.merge([found for found, _ in gathered])
        metrics = evaluator.summarize()
        write_whole(config.output / DETECTIONS, _as_json(evaluator))
        # As in the metrics, the first of two processes that have seen an image.
        _draw(dataset, {number: found for _, each in reversed(gathered) for number, found in each.items()}, config)
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
        evaluator = evaluator_of(dataset, config, image_ids=dataset.image_ids[:images])
        evaluator.merge([detections.by_image])
        evaluator.summarize()

    on_main_process(accelerator, summarize)


def evaluator_of(
    dataset: CocoDataset, config: CocoTrainingConfig, image_ids: Sequence[int] | None = None
) -> CocoEvaluator:
    """The metric of a run: of the images with these ids, or of all of the data set."""
    return CocoEvaluator(
        dataset.annotation_file, config.model.iou_type, category_ids=dataset.category_ids, image_ids=image_ids
    )


@torch.no_grad()
def _detect(
    model: nn.Module,
    batches: Iterable[Batch],
    collected: CollectedDetections,
    config: CocoTrainingConfig,
    show: Collection[int] = (),
    between_batches: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, torch.Tensor]]:
    """Collect the detections of images. Returns those of the images to show, by id."""
    model.eval()
    shown: dict[int, dict[str, torch.Tensor]] = {}
    for batch in batches:
        detections = postprocess(model(batch.images, batch.masks), batch.original_sizes, top_k=config.top_k)
        for image_id, detection in zip(batch.image_ids, detections, strict=True):
            collected.add(image_id, detection)
            if image_id in show:
                shown[image_id] = {name: value.cpu() for name, value in detection.items()}
        between_batches()
    return shown


def _as_json(evaluator: CocoEvaluator) -> str:
    """The detections in COCO's result format, without all of them as Python objects at once."""
    images = (json.dumps(results)[1:-1] for results in evaluator.results_by_image())
    return f"[{', '.join(filter(None, images))}]\n"


def warn_of_other_categories(config: CocoTrainingConfig, val_set: CocoDataset, consequence: str) -> None:
    """Warn if the checkpoint ``load``, with a class head that fits the data, was trained on other classes than theirs.

    Args:
        config: the run.
        val_set: its data to evaluate on.
        consequence: what follows from that.
    """
    checkpoint = config.model.load
    if checkpoint is None:
        return
    header = describe_model(checkpoint, config.model.model)
    difference = difference_in_words(header.categories, val_set.categories, ("the checkpoint", "the data"))
    fits = header.model_config.get("num_classes", val_set.num_classes) == val_set.num_classes
    if header.categories and difference and fits:
        logger.warning(
            "%s was trained on other categories than those of %s (%s): %s",
            checkpoint,
            val_set.annotation_file,
            difference,
            consequence,
        )


def _draw(dataset: CocoDataset, detections: dict[int, dict[str, torch.Tensor]], config: CocoTrainingConfig) -> None:
    """Write ``predictions.png`` for the first images."""
    indices = range(min(config.pictures, len(dataset)))
    if not indices:
        return
    draw_detections(
        [dataset.image(index) for index in indices],
        [dataset.ground_truth(index) for index in indices],
        [detections[dataset.image_ids[index]] for index in indices],
        dataset.class_names,
        config.output / PREDICTIONS,
        score_threshold=PICTURE_THRESHOLD,
    )
