"""One page that says how a training or an evaluation went: ``index.html`` in the folder of the run."""

import html
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from ..data import CocoDataset
from ..evaluation.coco import METRICS
from ..evaluation.diagnosis import ERRORS, ClassDiagnosis, Diagnosis, diagnose
from ..evaluation.plots import draw_confusion, draw_curves, draw_errors, draw_precision_recall
from ..evaluation.visualize import draw_detections
from ..files import read_json, write_json, write_whole
from ..pages import embedded_picture, html_page, html_table
from ..training.selection import best_epoch
from .config import CocoTrainingConfig
from .folder import DETECTIONS, PAGE, PICTURES, THRESHOLDS
from .kept_files import CONFIG_FILE

__all__ = ["write_report"]

logger = logging.getLogger(__name__)

WORST_IMAGES = 6


def write_report(
    config: CocoTrainingConfig,
    dataset: CocoDataset,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
) -> Path | None:
    """Write ``index.html`` and the pictures in it, from ``detections.json`` in the folder of the run.

    Beside it comes ``class_thresholds.json``: of each class the score from which detections are best kept, as
    prediction takes it; null where none is right.

    The page needs no other file. It has the metrics, for each class its AP and the score from which detections are
    best kept, errors by kind, a confusion matrix, the worst images, the curves of a training and its settings.

    Args:
        config: the run.
        dataset: what was evaluated.
        metrics: of the detections.
        history: the ``epochs`` of ``results.json``, of a training.

    Returns:
        The page; None if it could not be written, which is logged and costs nothing else.
    """
    try:
        return _write(config, dataset, metrics, history)
    except (OSError, ValueError) as error:
        logger.warning("the page %s was not written: %s", config.output / PAGE, error)
        return None


def _write(
    config: CocoTrainingConfig,
    dataset: CocoDataset,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> Path:
    folder = config.output / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    results = read_json(config.output / DETECTIONS) or []
    diagnosis = diagnose(dataset.annotation_file, results, config.model.iou_type)
    write_json(config.output / THRESHOLDS, {each.name: each.threshold for each in diagnosis.classes})
    sections = [_summary(config, dataset, metrics, history)]
    if history:
        draw_curves(history, folder / "curves.png")
        sections += ["<h2>Training</h2>", embedded_picture(folder / "curves.png", "training loss and AP by epoch")]
    sections += _of_classes(diagnosis, metrics, folder)
    sections += _of_errors(diagnosis, folder)
    sections += _of_images(diagnosis, results, dataset, folder)
    sections += ["<h2>Settings</h2>", _command(config, history), f"<pre>{html.escape(config.as_yaml())}</pre>"]
    write_whole(config.output / PAGE, html_page(f"{config.model.model}: {config.output.name}", "\n".join(sections)))
    return config.output / PAGE


def _summary(
    config: CocoTrainingConfig,
    dataset: CocoDataset,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    model = config.model
    queries = "" if model.num_queries is None else f" of {model.num_queries} queries"
    what = f"<p>{html.escape(model.model)}, {model.num_groups} group(s){queries} in training, one in inference. "
    what += f"{len(dataset)} images of {html.escape(str(dataset.annotation_file))}.</p>"
    best = best_epoch(history)
    if best is not None:
        minutes = sum(row["seconds"] for row in history) / 60
        what += f"<p>{len(history)} epochs in {minutes:.1f} minutes of training; best AP {best['metrics']['AP']:.3f} "
        what += f"in epoch {best['epoch']}. What follows is the last evaluation.</p>"
    return what + html_table([{name: metrics[name] for name in METRICS}])


def _of_classes(diagnosis: Diagnosis, metrics: Mapping[str, Any], folder: Path) -> list[str]:
    draw_precision_recall(diagnosis.classes, folder / "precision_recall.png")
    rows = [_row(each, metrics["per_category"].get(each.name)) for each in diagnosis.classes]
    rows.sort(key=lambda row: -1.0 if row["AP"] is None else -row["AP"])
    return [
        "<h2>Classes</h2>",
        "<p>Threshold: the score from which detections of the class are best kept, by F1 at IoU 0.5. Precision, recall "
        "and F1 are those of the detections that it keeps.</p>",
        html_table(rows),
        embedded_picture(folder / "precision_recall.png", "precision against recall of each class"),
    ]


def _row(diagnosis: ClassDiagnosis, ap: float | None) -> dict[str, Any]:
    precision, recall, f1 = diagnosis.at_threshold
    return {
        "class": diagnosis.name,
        "objects": diagnosis.objects,
        "AP": ap,
        "threshold": diagnosis.threshold,
        "precision": precision,
        "recall": recall,
        "F1": f1,
    }


def _of_errors(diagnosis: Diagnosis, folder: Path) -> list[str]:
    draw_errors(diagnosis, folder / "errors.png")
    draw_confusion(diagnosis, folder / "confusion.png")
    meanings = [
        {"error": kind, "number": diagnosis.errors[kind], "meaning": meaning} for kind, meaning in ERRORS.items()
    ]
    return [
        "<h2>Errors</h2>",
        "<p>Each class at its threshold.</p>",
        embedded_picture(folder / "errors.png", "number of errors of each kind"),
        html_table(meanings),
        "<h2>Which class is taken for which</h2>",
        embedded_picture(folder / "confusion.png", "confusion matrix"),
    ]


def _of_images(
    diagnosis: Diagnosis, results: Sequence[Mapping[str, Any]], dataset: CocoDataset, folder: Path
) -> list[str]:
    """The images with the most errors, with their objects and the detections that are kept."""
    worst = [image for image in diagnosis.images[:WORST_IMAGES] if image.wrong + image.missed]
    if not worst:
        return []
    labels = {category_id: label for label, category_id in enumerate(dataset.category_ids.tolist())}
    classes = zip(dataset.categories, diagnosis.classes, strict=True)  # both ascending by id
    thresholds = {category["id"]: each.threshold for category, each in classes}
    kept = defaultdict(list)
    for result in results:
        threshold = thresholds.get(result["category_id"])
        if threshold is not None and result["score"] >= threshold:
            kept[result["image_id"]].append(result)
    places = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    indices = [places[image.image_id] for image in worst]
    draw_detections(
        [dataset.image(index) for index in indices],
        [dataset.ground_truth(index) for index in indices],
        [_as_detections(kept[image.image_id], labels) for image in worst],
        dataset.class_names,
        folder / "worst.png",
        score_threshold=0.0,
    )
    rows = [{"image id": image.image_id, "wrong detections": image.wrong, "missed": image.missed} for image in worst]
    return [
        "<h2>The images with the most errors</h2>",
        html_table(rows),
        embedded_picture(folder / "worst.png", "images with their objects and detections"),
    ]


def _as_detections(results: Sequence[Mapping[str, Any]], labels: Mapping[int, int]) -> dict[str, Tensor]:
    """Entries of COCO's result format as ``postprocess`` gives them."""
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float32).reshape(-1, 4)
    detections = {
        "scores": torch.tensor([result["score"] for result in results], dtype=torch.float32),
        "labels": torch.tensor([labels[result["category_id"]] for result in results], dtype=torch.int64),
        "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
    }
    if any("segmentation" in result for result in results):
        masks = np.stack([rle.decode(result["segmentation"]) for result in results])
        detections["masks"] = torch.from_numpy(masks).bool()
    return detections


def _command(config: CocoTrainingConfig, history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    settings = html.escape(str(config.output / CONFIG_FILE))
    return f"<p>The same training again:</p><pre>groupdetr train --config {settings} --output ANOTHER_FOLDER</pre>"
