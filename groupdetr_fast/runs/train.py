"""Train a detector on COCO-format data: puts data, model, criterion, training loop and COCO evaluation together."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from ..data import CocoDataset, DataError, SkipUnreadable
from ..data.categories import difference_in_words
from ..data.device_images import DeviceImages
from ..data.images import as_rgb
from ..data.own_transforms import OwnTransforms
from ..evaluation.coco import format_table
from ..files import read_json
from ..models.checkpoints import CheckpointHeader
from ..prediction import EVAL_SETTINGS
from ..training.checkpoint import BEST, CHECKPOINTS, resumable_checkpoints
from ..training.config import LoopSettings
from ..training.display import RunLog
from ..training.engine import Trainer, TrainerSettings
from ..training.faults import deaths_of_processes_explained, lack_of_memory_explained
from ..training.gradients import Observe
from ..training.processes import on_main_process
from ..training.results import RESULTS
from ..training.tracking import check_trackers, log_picture
from .batch_size import with_batch_size
from .class_weights import class_weights_of, criterion_of
from .config import CocoTrainingConfig
from .evaluate import evaluate, rehearse_evaluation, warn_of_other_categories
from .folder import PAGE, PREDICTIONS, clear, reserved
from .kept_files import keep_files
from .loaders import (
    evaluation_loader,
    evaluation_samples,
    evaluation_set,
    training_loader,
    training_samples,
    training_set,
)
from .report import write_report
from .resuming import described_checkpoint, require_data, require_same_run, seems_ended, warn_of_changes
from .trainer import launched

__all__ = ["train"]

logger = logging.getLogger(__name__)

LOG_FILE = "train.log"


def train(config: CocoTrainingConfig, *, observe: Observe | None = None) -> dict[str, Any]:
    """Run a training, and print the COCO table of its end.

    Args:
        config: the run.
        observe: see ``training.engine.Trainer``.

    Returns:
        What ``output/results.json`` holds.

    Raises:
        DataError: for a fault in the data; the sentence names the file or the id.
        TrainingError: if memory runs out, or for what ``Trainer.fit`` raises it.
        TrainingStopped: after SIGTERM or Ctrl-C, once a checkpoint is written.
        ValueError: for settings that do not fit together, for an output folder that another training uses or that
            holds a run that is neither to be resumed nor to be overwritten, and for ``eval_only``, which is
            :func:`~groupdetr_fast.runs.evaluate.evaluate_checkpoint`.
    """
    if config.eval_only:
        raise ValueError("eval_only is not a training: call runs.evaluate.evaluate_checkpoint")
    check_trackers(config.track)
    config, accelerator = launched(config)
    with (
        reserved(accelerator, config.output, resume=config.resume, overwrite=config.overwrite),
        deaths_of_processes_explained(),
        _log(config, accelerator) as log,
    ):
        require_data(config)
        data = _load_data(config, accelerator.device)
        newest = described_checkpoint(config.output) if config.resume else None
        resuming = config.resume and bool(resumable_checkpoints(config.output))
        if resuming:
            require_same_run(config, data.val_set, newest)
        config = with_batch_size(config, accelerator, data.train_set, newest)
        if resuming and accelerator.is_main_process:  # with a number in place of "auto"
            warn_of_changes(config)
        with lack_of_memory_explained(config.optimization.images_per_batch):
            return _train(config, accelerator, data, newest, log, observe)


class _Data(NamedTuple):
    """The images of a training: as data sets, and as they are loaded.

    Attributes:
        train_set, val_set: what is trained and evaluated on.
        train_samples, val_samples: what batches are made of: the same, perhaps from the memory of the device.
        transforms: of the user's own, if the run has some.
    """

    train_set: CocoDataset
    val_set: CocoDataset
    train_samples: SkipUnreadable | DeviceImages
    val_samples: CocoDataset | DeviceImages
    transforms: OwnTransforms | None


def _load_data(config: CocoTrainingConfig, device: torch.device) -> _Data:
    transforms = OwnTransforms(config.augmentation.transforms) if config.augmentation.transforms else None
    val_set, train_set = evaluation_set(config), training_set(config, transforms)
    _require_equal_categories(train_set, val_set)
    # The device's memory has the images to train on first, and then what fits beside them.
    samples = training_samples(train_set, config, device), evaluation_samples(val_set, config, device)
    return _Data(train_set, val_set, *samples, transforms)


def _log(config: CocoTrainingConfig, accelerator: Accelerator) -> RunLog:
    """The log of a run; one that has ended gets a line only if it goes on all the same."""
    ended = config.resume and on_main_process(accelerator, lambda: seems_ended(config))
    return RunLog(config.output / LOG_FILE if accelerator.is_main_process else None, held=ended)


def _train(
    config: CocoTrainingConfig,
    accelerator: Accelerator,
    data: _Data,
    newest: Path | None,
    log: RunLog,
    observe: Observe | None,
) -> dict[str, Any]:
    """The training of :func:`train`, once batches have a size and the folder is reserved.

    If the run is resumed, the checkpoint ``newest`` says what its detector is. Nothing is written into a run that has
    ended, for which the log is held.
    """
    weights = class_weights_of(config, data.train_set)
    model = config.model.build(data.val_set.num_classes, resumed=newest)
    if newest is None:
        warn_of_other_categories(config, data.val_set, "its class head is kept, and learns those of the data anew")
    header = _header(config, model, data.val_set)
    val_loader = accelerator.prepare(evaluation_loader(data.val_samples, config))

    def evaluate_epoch(trainer: Trainer) -> dict[str, Any]:
        model, display = trainer.state.model, trainer.progress.display
        metrics = evaluate(accelerator, model, val_loader, data.val_set, config, trainer.stop_if_asked, display)
        picture = config.output / PREDICTIONS
        log_picture(accelerator, "predictions", picture, trainer.state.batches, read=as_rgb)
        return metrics

    trainer = Trainer(
        accelerator,
        model,
        criterion_of(config, model, weights).to(accelerator.device),
        training_loader(data.train_samples, config),
        _settings(config, header, getattr(model, "files", dict)()),
        evaluate=evaluate_epoch,
        observe=observe,
    )
    if config.resume and not trainer.resume():
        logger.warning("nothing to resume in %s: starting from the beginning", config.output)
    if log.held and trainer.has_ended():
        results: dict[str, Any] = on_main_process(accelerator, lambda: read_json(config.output / RESULTS))
        if accelerator.is_main_process:
            _say_results(config, results, config.output / PAGE if config.report else None)
        return results
    log.release()
    rehearse_evaluation(accelerator, trainer.state.model, data.val_set, config)
    if accelerator.is_main_process:
        if config.overwrite:  # not before everything that could be refused has been tried
            clear(config.output)
        keep_files(config, data.transforms, weights)
    results = trainer.fit()
    if accelerator.is_main_process:
        metrics = results["epochs"][-1].get("metrics")
        write = config.report and metrics is not None
        page = write_report(config, data.val_set, metrics, results["epochs"]) if write else None
        _say_results(config, results, page)
    return results


def _say_results(config: CocoTrainingConfig, results: dict[str, Any], page: Path | None) -> None:
    """Print how the training ended, and where the page about it is."""
    if "metrics" in results["epochs"][-1]:  # not so if it has fewer epochs to train than it has begun
        print(format_table(results["epochs"][-1]["metrics"]))
    if page is not None:
        print(f"report: {page}")
    if results["best_epoch"] is not None:
        print(f"best epoch: {results['best_epoch']}, in {config.output / CHECKPOINTS / BEST}")
    print(f"results: {config.output}")


def _require_equal_categories(train_set: CocoDataset, val_set: CocoDataset) -> None:
    difference = difference_in_words(train_set.categories, val_set.categories, ("the first", "the second"))
    if difference:
        raise DataError(
            f"{train_set.annotation_file} and {val_set.annotation_file} have different categories ({difference}): give "
            "both files the same ones"
        )


def _header(config: CocoTrainingConfig, model: Any, val_set: CocoDataset) -> CheckpointHeader:
    """What the checkpoints of a run say of their detector."""
    described = {}
    if config.model.of_transformers:
        model.name_classes(val_set.class_names)
        described = model.describe()
    return CheckpointHeader(
        model=config.model.model,
        model_config=asdict(model.config),
        categories=val_set.categories,
        labels=config.data.labels,
        evaluation={name: getattr(config.augmentation, name) for name in EVAL_SETTINGS},
        transformers=described,
    )


def _settings(config: CocoTrainingConfig, header: CheckpointHeader, files: Mapping[str, str]) -> TrainerSettings:
    """What the training loop needs to know of a run."""
    loop = {each.name: getattr(config, each.name) for each in fields(LoopSettings)}
    if config.strict:
        loop["max_skipped_steps"] = 0
    return TrainerSettings(
        config.optimization,
        config.output,
        header.to_json(),
        files=files,
        trackers=config.track,
        tracked=config.by_name(),
        **loop,
    )
