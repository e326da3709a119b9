"""Train a detector on COCO-format data: puts data, model, criterion, training loop and COCO evaluation together."""

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn

from ..data import CocoDataset, DataError, SkipUnreadable
from ..data.device_images import DeviceImages
from ..data.own_transforms import OwnTransforms
from ..evaluation.coco import format_table
from ..files import write_whole
from ..models.checkpoints import CheckpointHeader, read_header
from ..prediction import EVAL_SETTINGS, class_table
from ..training.batch_size import check_auto
from ..training.checkpoint import BEST, latest_checkpoint, resumable_checkpoints
from ..training.engine import Trainer, TrainerSettings, build_accelerator
from ..training.faults import deaths_of_processes_explained, lack_of_memory_explained
from ..training.progress import logged_to
from ..training.tracking import check_trackers, log_picture
from ..transformers_detector.families import of_transformers
from .batch_size import with_batch_size
from .class_weights import class_weights_of, criterion_of
from .config import STARTED, CocoTrainingConfig
from .config_file import from_yaml, to_plain
from .evaluate import evaluate, rehearse_evaluation
from .folder import clear, reserved
from .kept_files import keep_files, with_kept_files
from .loaders import (
    evaluation_loader,
    evaluation_samples,
    evaluation_set,
    training_loader,
    training_samples,
    training_set,
)
from .report import write_report

__all__ = ["train"]

logger = logging.getLogger(__name__)

CONFIG_FILE, LOG_FILE = "config.yaml", "train.log"
# What resuming cannot change, besides the detector; and what it can change of that.
FIXED = {"data.labels"} | {
    f"optimization.{name}" for name in ("backbone_layer_decay", "decay_norms", "freeze", "query_lr", "seed")
}
FREE = {
    f"model.{name}" for name in ("dropout", "class_loss", "l1_loss", "giou_loss", "loss_points", "accelerate_kernels")
}


def train(
    config: CocoTrainingConfig, *, observe: Callable[[int, nn.Module, Any, Any], None] | None = None
) -> dict[str, Any]:
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
    config = replace(config, optimization=config.optimization.as_launched())
    check_trackers(config.track)
    config.output.mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(config.optimization, config.output)
    check_auto(accelerator, config.optimization)
    with (
        reserved(accelerator, config.output, resume=config.resume, overwrite=config.overwrite),
        deaths_of_processes_explained(),
        logged_to(config.output / LOG_FILE) if accelerator.is_main_process else nullcontext(),
    ):
        return _train(config, accelerator, observe)


def _train(
    config: CocoTrainingConfig,
    accelerator: Accelerator,
    observe: Callable[[int, nn.Module, Any, Any], None] | None,
) -> dict[str, Any]:
    """The training of :func:`train`, in a folder that no other one uses."""
    own = OwnTransforms(config.augmentation.transforms) if config.augmentation.transforms else None
    val_set, train_set = evaluation_set(config), training_set(config, own)
    _check_categories(train_set, val_set)
    device = accelerator.device  # whose memory has the images first, and then what fits beside them
    samples = _Samples(training_samples(train_set, config, device), evaluation_samples(val_set, config, device))
    config = with_batch_size(config, accelerator, train_set)
    with lack_of_memory_explained(config.optimization.images_per_batch):
        return _train_on(config, accelerator, train_set, val_set, samples, own, observe)


class _Samples(NamedTuple):
    """What is loaded, in training and in evaluation."""

    train: SkipUnreadable | DeviceImages
    val: CocoDataset | DeviceImages


def _train_on(
    config: CocoTrainingConfig,
    accelerator: Accelerator,
    train_set: CocoDataset,
    val_set: CocoDataset,
    samples: _Samples,
    own: OwnTransforms | None,
    observe: Callable[[int, nn.Module, Any, Any], None] | None,
) -> dict[str, Any]:
    """The same on these data, with batches of a known size."""
    weights = class_weights_of(config, train_set)
    newest = latest_checkpoint(config.output) if config.resume else None
    model = config.model.build(val_set.num_classes, resumed=newest)
    header = _header(config, model, val_set)
    val_loader = accelerator.prepare(evaluation_loader(samples.val, config))

    def run_evaluation(model: nn.Module) -> dict[str, Any]:
        running = own_trainer()
        assert running is not None  # it is what calls this
        display = running.progress.display
        metrics = evaluate(accelerator, model, val_loader, val_set, config, running.stop_if_asked, display)
        log_picture(accelerator, "predictions", config.output / "predictions.png", running.state.batches)
        return metrics

    trainer = Trainer(
        accelerator,
        model,
        criterion_of(config, model, weights).to(accelerator.device),
        training_loader(samples.train, config),
        _settings(config, header, getattr(model, "files", dict)()),
        evaluate=run_evaluation,
        observe=observe,
    )
    # Two that refer to each other would live until the interpreter ends, and the threads of DDP's process group with
    # them, which then abort it now and then (pytorch/pytorch#179291).
    own_trainer = weakref.ref(trainer)
    if newest is not None:
        _compare_with_beginning(config, loud=accelerator.is_main_process)
        _compare_categories(config, val_set)
    if config.resume and not trainer.resume():
        logger.warning("nothing to resume in %s: starting from the beginning", config.output)
    rehearse_evaluation(accelerator, trainer.state.model, val_set, config)
    if accelerator.is_main_process:
        if config.overwrite:  # not before everything that could be refused has been tried
            clear(config.output)
        keep_files(config, own, weights)
        write_whole(config.output / CONFIG_FILE, with_kept_files(config).as_yaml())
    results = trainer.fit()
    if accelerator.is_main_process:
        if "metrics" in results["epochs"][-1]:  # not so if it has fewer epochs to train than it has begun
            metrics = results["epochs"][-1]["metrics"]
            print(format_table(metrics))
            if config.report and (page := write_report(config, val_set, metrics, results["epochs"])):
                print(f"report: {page}")
        if results["best_epoch"] is not None:
            print(f"best epoch: {results['best_epoch']}, in {config.output / 'checkpoints' / BEST}")
        print(f"results: {config.output}")
    return results


def _compare_with_beginning(config: CocoTrainingConfig, *, loud: bool) -> None:
    """Say how a configuration differs from that of the run which it resumes.

    Raises:
        ValueError: if a setting differs that cannot change within a run.
    """
    path = config.output / CONFIG_FILE
    if not path.exists():  # of a version that wrote none
        return
    begun, now = (_flat(each) for each in (from_yaml(CocoTrainingConfig, path), with_kept_files(config)))
    for name in now:
        if now[name] == begun[name]:
            continue
        if name in FIXED or (name.startswith("model.") and name not in FREE):
            raise ValueError(
                f"{config.output} was begun with {name} = {begun[name]}, which cannot become {now[name]} on resuming: "
                "leave it as it was, or begin another run with another output"
            )
        if loud:
            logger.warning("resuming with %s = %s, which was %s", name, now[name], begun[name])


def _compare_categories(config: CocoTrainingConfig, val_set: CocoDataset) -> None:
    """Refuse to resume with data of other classes, even where there are as many.

    Raises:
        ValueError: if an id or a name differs.
    """
    for folder in resumable_checkpoints(config.output):
        try:
            begun = {entry["id"]: entry["name"] for entry in read_header(folder).categories}
        except ValueError:  # damaged: resuming says so, and goes back to the one before it
            continue
        now = {entry["id"]: str(entry["name"]) for entry in val_set.categories}
        if not begun:
            continue
        if begun != now:
            number = min(dict(begun.items() ^ now.items()))
            was, is_now = (repr(each[number]) if number in each else "none" for each in (begun, now))
            raise ValueError(
                f"{config.output} was begun with other categories than those of {val_set.annotation_file} (category "
                f"{number} was {was} and is {is_now}): resume with the data of its beginning, or begin another run "
                "with another output, and load to start from these weights"
            )
        return


def _flat(config: CocoTrainingConfig) -> dict[str, Any]:
    """The settings by their full names, without those that say how a run is started and where it is."""
    plain = to_plain(replace(config, optimization=config.optimization.resolved()))
    rooms = {name: value for name, value in plain.items() if isinstance(value, dict)}
    flat = {name: plain[name] for name in plain.keys() - rooms.keys() - {*STARTED, "output", "recipe", "config"}}
    return flat | {f"{room}.{name}": value for room, values in rooms.items() for name, value in values.items()}


def _header(config: CocoTrainingConfig, model: Any, val_set: CocoDataset) -> CheckpointHeader:
    """What the checkpoints of a run say of their detector."""
    described = {}
    if of_transformers(config.model.model):
        model.name_classes(class_table(val_set.categories, config.data.labels)[0])
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
    return TrainerSettings(
        config.optimization.resolved(),
        config.output,
        header.to_json(),
        evaluate_every=config.evaluate_every,
        early_stopping=config.early_stopping,
        early_stopping_delta=config.early_stopping_delta,
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        keep_checkpoints=config.keep_checkpoints,
        max_skipped_steps=0 if config.strict else config.max_skipped_steps,
        files=files,
        trackers=config.track,
        tracked=_flat(config),
    )


def _check_categories(train_set: CocoDataset, val_set: CocoDataset) -> None:
    train, val = (
        {category["id"]: category.get("name") for category in dataset.categories} for dataset in (train_set, val_set)
    )
    if train.keys() != val.keys():
        differing = sorted(train.keys() ^ val.keys())
        raise DataError(
            f"{train_set.annotation_file} and {val_set.annotation_file} have different category tables "
            f"(ids {differing[:5]} are in one only): give both files the same categories"
        )
    renamed = next((number for number in sorted(train) if train[number] != val[number]), None)
    if renamed is not None:
        raise DataError(
            f"category {renamed} is {train[renamed]!r} in {train_set.annotation_file} and {val[renamed]!r} in "
            f"{val_set.annotation_file}: give both files the same categories"
        )
