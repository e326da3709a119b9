"""Train a detector on COCO-format data: puts data, model, criterion, training loop and COCO evaluation together."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .build import build_criterion
from .config_file import to_yaml
from .data import (
    AugmentationConfig,
    CocoDataset,
    DataError,
    DigitsConfig,
    EpochSampler,
    SkipUnreadable,
    collate,
    digits_dataset,
    eval_transforms,
    find_data,
    train_transforms,
)
from .evaluation.coco import CocoEvaluator, format_table
from .evaluation.visualize import draw_detections
from .files import write_whole
from .inference import EVAL_SETTINGS, class_table
from .losses.matcher import Assignment
from .models import build_model, load_checkpoint, model_config, postprocess
from .models.checkpoints import CheckpointHeader, read_header
from .training.checkpoint import BEST
from .training.engine import Trainer, TrainerSettings, build_accelerator
from .training.optimization import OptimizationConfig

__all__ = ["CocoTrainingConfig", "DataConfig", "DataPaths", "ModelConfig", "digits_demo", "evaluate", "train"]

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
STARTED = ("resume", "eval_only")  # how a run is started, not what it is: not in its configuration's file
PICTURE_THRESHOLD = 0.3  # focal loss keeps the scores of right detections well below 1


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """Where the images and annotations are.

    Attributes:
        data_path: folder of a data set in COCO's layout, that of Roboflow's COCO export, or YOLO's.
        coco_path: folder with COCO's ``train2017/``, ``val2017/`` and ``annotations/``; or name the four below.
        train_images: folder of the images to train on.
        train_annotations: COCO json to train on.
        val_images: folder of the images to evaluate on.
        val_annotations: COCO json to evaluate on.
    """

    data_path: Path | None = None
    coco_path: Path | None = None
    train_images: Path | None = None
    train_annotations: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None

    def train_paths(self) -> tuple[Path, Path]:
        """Folder of images and annotation file to train on.

        Raises:
            DataError: if they are not given, or are given twice.
        """
        return self._paths("train", self.train_images, self.train_annotations)

    def val_paths(self) -> tuple[Path, Path]:
        """Folder of images and annotation file to evaluate on; raises as :meth:`train_paths`."""
        return self._paths("val", self.val_images, self.val_annotations)

    def _paths(self, part: str, images: Path | None, annotations: Path | None) -> tuple[Path, Path]:
        files = any((self.train_images, self.train_annotations, self.val_images, self.val_annotations))
        if (self.data_path is not None) + (self.coco_path is not None) + files > 1:
            raise DataError("give data_path, coco_path, or the four of train and val images and annotations: only one")
        if self.data_path is not None:
            return find_data(self.data_path, part)
        if self.coco_path is not None:
            return self.coco_path / f"{part}2017", self.coco_path / "annotations" / f"instances_{part}2017.json"
        if images is None or annotations is None:
            raise DataError(f"give data_path, coco_path, or both {part}_images and {part}_annotations")
        return images, annotations


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataPaths):
    """The images and annotations, and how they are read.

    Attributes:
        labels: "contiguous" numbers the categories 0, 1, ... in the order of their ids; "category_id" uses the ids
            themselves, as the original repositories do (91 classes on COCO).
        workers: processes that load images, per training process.
        cache_images: keep decoded images in memory; for small data sets.
        max_unreadable_images: images to train on that may be missing or damaged, in each process; another one stands
            in for each.
    """

    labels: Literal["contiguous", "category_id"] = "contiguous"
    workers: int = 2
    cache_images: bool = False
    max_unreadable_images: int = 10


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which detector. Every setting that is None keeps the model's own default.

    Attributes:
        model: name of the detector: conditional_detr_r50, dab_detr_r50, dn_detr_r50 (each also with _dc5),
            dab_deformable_detr_r50, dino_4scale_r50 or mask2former_r50.
        num_groups: K, groups of queries in training.
        num_queries: N, queries of one group.
        d_model: size of tokens and queries.
        num_heads: attention heads.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        dim_feedforward: hidden size of the feed-forward blocks.
        encoder_dim_feedforward: the same in the pixel decoder of Mask2Former.
        dropout: probability.
        backbone: resnet50 and the like, timm:NAME, or conv:W1-W2-... (small convolutions).
        backbone_weights: imagenet (downloaded on first use), or a file; without either, the weights are random.
        backbone_stages: use the first stages of the backbone only.
        dilation: dilate the backbone's last stage (DC5).
        frozen_stages: stages of the backbone that are not trained.
        input_norm: normalise the projected features (for backbones whose features are large).
        class_loss: weight of the loss of classes.
        l1_loss: weight of the L1 loss of boxes.
        giou_loss: weight of the GIoU loss of boxes.
        loss_points: points of a mask at which Mask2Former computes costs and losses.
        load: checkpoint to start from (of this package, an original repository or transformers).
        new_class_head: with ``load``: train a new class head where the number of classes differs.
    """

    model: str = "conditional_detr_r50"
    num_groups: int = 11
    num_queries: int | None = None
    d_model: int | None = None
    num_heads: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    dim_feedforward: int | None = None
    encoder_dim_feedforward: int | None = None
    dropout: float | None = None
    backbone: str | None = None
    backbone_weights: str | None = None
    backbone_stages: int | None = None
    dilation: bool | None = None
    frozen_stages: int | None = None
    input_norm: bool | None = None
    class_loss: float | None = None
    l1_loss: float | None = None
    giou_loss: float | None = None
    loss_points: int | None = None
    load: Path | None = None
    new_class_head: bool = False

    @classmethod
    def of_checkpoint(cls, header: CheckpointHeader, **changes: Any) -> "ModelConfig":
        """The detector that a checkpoint describes, without weights of its backbone, which the checkpoint has itself.

        Args:
            header: of the checkpoint; settings in it that are no fields here are left out.
            **changes: fields that differ.
        """
        settings = {f.name: header.model_config[f.name] for f in fields(cls) if f.name in header.model_config}
        return cls(**{**settings, "model": header.model, "backbone_weights": None, **changes})

    @property
    def predicts_masks(self) -> bool:
        """Whether the detector predicts masks, and not boxes."""
        return model_config(self.model).predicts_masks

    def build(self, num_classes: int) -> nn.Module:
        """The detector as a training begins with it, with the weights of ``load`` if that is given."""
        model = self._build(num_classes)
        if self.load is not None:
            load_checkpoint(model, self.load, new_class_head=self.new_class_head)
        elif model.config.backbone_weights is None and not model.config.backbone.startswith("conv:"):
            logger.warning(
                "the backbone %s starts from random weights, of which the first %d stages stay as they are: "
                "pass backbone_weights (imagenet or a file) to start from pretrained ones",
                model.config.backbone,
                model.config.frozen_stages,
            )
        return model

    def build_empty(self, num_classes: int) -> nn.Module:
        """The detector with random weights everywhere, for those of a checkpoint to replace."""
        return replace(self, backbone_weights=None)._build(num_classes)

    def _build(self, num_classes: int) -> nn.Module:
        own = ("model", "num_groups", "load", "new_class_head")
        overrides = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        return build_model(self.model, num_classes=num_classes, num_groups=self.num_groups, **overrides)


@dataclass(frozen=True, kw_only=True)
class CocoTrainingConfig:
    """One training run.

    Attributes:
        data: images and annotations.
        model: the detector.
        augmentation: sizes and probabilities of the augmentation.
        optimization: schedule, rates, batch.
        assignment: how targets are assigned to queries: "group" is Group DETR; "one_to_one" and "one_to_many" assign
            them to all queries together, for comparison.
        positives: queries that each target gets, or None for ``num_groups``.
        output: folder of the run: configuration, checkpoints, TensorBoard curves, ``results.json`` and pictures.
        resume: continue from the newest checkpoint in ``output``.
        eval_only: evaluate the weights of ``load`` and stop; needs no data to train on.
        evaluate_every: epochs between evaluations.
        early_stopping: epochs without a better AP after which the training ends; 0 to train all of them.
        early_stopping_delta: by how much AP (0 to 1) must rise to count as better.
        checkpoint_every: optimiser steps between checkpoints within an epoch; 0 for none but at its end.
        max_skipped_steps: steps of an epoch that may be skipped because their loss is not finite.
        strict: stop at the first unreadable image and the first loss that is not finite.
        top_k: detections per image in evaluation.
        pictures: images in ``predictions.png``; 0 for no picture.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    assignment: Assignment = "group"
    positives: int | None = None
    output: Path = Path("runs/coco")
    resume: bool = False
    eval_only: bool = False
    evaluate_every: int = 1
    early_stopping: int = 0
    early_stopping_delta: float = 0.0
    checkpoint_every: int = 0
    max_skipped_steps: int = 10
    strict: bool = False
    top_k: int = 100
    pictures: int = 12

    def __post_init__(self):
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        for name in ("early_stopping", "early_stopping_delta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def as_yaml(self) -> str:
        """The configuration as ``groupdetr train --config`` reads it."""
        own = CocoTrainingConfig(**{f.name: getattr(self, f.name) for f in fields(CocoTrainingConfig)})
        return to_yaml(own, omit=STARTED)


def digits_demo(*, compose: bool = True) -> CocoTrainingConfig:
    """The run of ``make demo``: a small Conditional DETR with groups on the embedded digits, minutes on two CPU cores.

    Args:
        compose: find the data set, composing it on first use; without, the configuration names no files.
    """
    digits = DigitsConfig(image_size=64, min_digit=14, max_digit=36, max_objects=5)
    size = digits.image_size
    return CocoTrainingConfig(
        data=DataConfig(**digits_dataset(config=digits)._asdict() if compose else {}, workers=0, cache_images=True),
        model=ModelConfig(
            num_groups=5,
            num_queries=15,
            d_model=128,
            num_heads=4,
            encoder_layers=1,
            decoder_layers=3,
            dim_feedforward=256,
            dropout=0.0,
            backbone="conv:32-64-128",
        ),
        # a mirrored digit is another character
        augmentation=AugmentationConfig(
            short_sides=(size,), flip=0.0, crop=0.0, eval_short_side=size, max_size=None, eval_max_size=None
        ),
        optimization=OptimizationConfig(
            epochs=15, decay="cosine", warmup_steps=100, lr=1e-3, backbone_lr=1e-3, batch_size=16
        ),
        output=Path("runs/demo"),
        evaluate_every=5,
    )


def train(
    config: CocoTrainingConfig, *, observe: Callable[[int, nn.Module, Any, Any], None] | None = None
) -> dict[str, Any]:
    """Run a training, or an evaluation, and print its COCO table.

    Args:
        config: the run.
        observe: see ``training.engine.Trainer``.

    Returns:
        What ``output/results.json`` holds; with ``eval_only``, the metrics.

    Raises:
        DataError: for a fault in the data; the sentence names the file or the id.
        TrainingStopped: after SIGTERM, once a checkpoint is written.
        ValueError: for settings that do not fit together.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    optimization = config.optimization.resolved()
    accelerator = build_accelerator(optimization, config.output)
    val_images, val_annotations = config.data.val_paths()
    if not config.eval_only:
        train_images, train_annotations = config.data.train_paths()
    val_set = CocoDataset(
        val_images,
        val_annotations,
        eval_transforms(config.augmentation),
        labels=config.data.labels,
        masks=config.model.predicts_masks,
        cache_images=config.data.cache_images,
    )
    model = config.model.build(val_set.num_classes)
    val_loader = accelerator.prepare(_loader(val_set, config, shuffle=False))

    def run_evaluation(model: nn.Module) -> dict[str, Any]:
        return evaluate(accelerator, model, val_loader, val_set, config)

    if config.eval_only:
        _compare_categories(config.model.load, val_set, val_annotations)
        results = metrics = run_evaluation(accelerator.prepare_model(model, evaluation_mode=True))
    else:
        train_set = CocoDataset(
            train_images,
            train_annotations,
            train_transforms(config.augmentation),
            labels=config.data.labels,
            masks=config.model.predicts_masks,
            seed=optimization.seed,
            cache_images=config.data.cache_images,
        )
        _check_categories(train_set, val_set, train_annotations, val_annotations)
        readable_set = SkipUnreadable(train_set, 0 if config.strict else config.data.max_unreadable_images)
        header = CheckpointHeader(
            model=config.model.model,
            model_config=asdict(model.config),
            categories=val_set.categories,
            labels=config.data.labels,
            evaluation={name: getattr(config.augmentation, name) for name in EVAL_SETTINGS},
        )
        if accelerator.is_main_process:
            write_whole(config.output / CONFIG_FILE, config.as_yaml())
        settings = TrainerSettings(
            optimization,
            config.output,
            header.to_json(),
            evaluate_every=config.evaluate_every,
            early_stopping=config.early_stopping,
            early_stopping_delta=config.early_stopping_delta,
            checkpoint_every=config.checkpoint_every,
            max_skipped_steps=0 if config.strict else config.max_skipped_steps,
        )
        trainer = Trainer(
            accelerator,
            model,
            build_criterion(model, assignment=config.assignment, positives=config.positives),
            _loader(readable_set, config, shuffle=True, min_size=config.augmentation.jitter_size or 0),
            settings,
            evaluate=run_evaluation,
            observe=observe,
        )
        if config.resume and not trainer.resume():
            logger.warning("nothing to resume in %s: starting from the beginning", config.output)
        results = trainer.fit()
        metrics = results["epochs"][-1]["metrics"]
    if accelerator.is_main_process:
        print(format_table(metrics))
        if not config.eval_only and results["best_epoch"] is not None:
            print(f"best epoch: {results['best_epoch']}, in {config.output / 'checkpoints' / BEST}")
        print(f"results: {config.output}")
    return results


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, dataset: CocoDataset, config: CocoTrainingConfig
) -> dict[str, Any]:
    """COCO metrics of a model; writes ``detections.json`` and ``predictions.png`` into the folder of the run."""
    model.eval()
    iou_type = "segm" if config.model.predicts_masks else "bbox"
    evaluator = CocoEvaluator(dataset.coco, iou_type, category_ids=dataset.category_ids)
    shown: dict[int, dict[str, torch.Tensor]] = {}
    wanted = set(dataset.image_ids[: config.pictures])
    for batch in loader:
        detections = postprocess(model(batch.images, batch.masks), batch.original_sizes, top_k=config.top_k)
        evaluator.update(batch.image_ids, detections)
        for image_id, detection in zip(batch.image_ids, detections, strict=True):
            if image_id in wanted:
                shown[image_id] = {name: value.cpu() for name, value in detection.items()}
    evaluator.merge(gather_object([evaluator.state]))
    metrics = evaluator.summarize()
    if accelerator.is_main_process:
        (config.output / "detections.json").write_text(json.dumps(evaluator.results) + "\n")
        _draw(dataset, shown, config)
    return metrics


def _loader(dataset: Dataset, config: CocoTrainingConfig, *, shuffle: bool, min_size: int = 0) -> DataLoader:
    sampler = EpochSampler(dataset, shuffle=shuffle, seed=config.optimization.seed)
    workers = config.data.workers
    return DataLoader(
        dataset,
        config.optimization.batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=partial(collate, min_size=min_size),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _check_categories(train_set: CocoDataset, val_set: CocoDataset, train_file: Path, val_file: Path) -> None:
    ids = [{category["id"] for category in dataset.categories} for dataset in (train_set, val_set)]
    if ids[0] != ids[1]:
        differing = sorted(ids[0] ^ ids[1])
        raise DataError(
            f"{train_file} and {val_file} have different category tables (ids {differing[:5]} are in one only): "
            "give both files the same categories"
        )


def _compare_categories(checkpoint: Path | None, val_set: CocoDataset, val_file: Path) -> None:
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
            val_file,
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
