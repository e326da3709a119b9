"""The configuration of a run."""

import difflib
import logging
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import AugmentationConfig
from ..data.config import DataConfig
from ..losses.matcher import Assignment
from ..models import build_model, load_checkpoint, model_config
from ..models.checkpoints import CheckpointHeader, CheckpointMismatch, read_header
from ..models.checkpoints.read import find_weights
from ..models.detector import Detector
from ..models.postprocess import check_selection
from ..training.config import OptimizationConfig
from ..training.tracking import TrackerName
from ..transformers_detector.families import PREFIX, of_transformers, place_of, require_transformers
from .config_file import to_yaml

if TYPE_CHECKING:
    from ..transformers_detector.detector import TransformersDetector

__all__ = ["BALANCED", "CocoTrainingConfig", "ModelConfig"]

logger = logging.getLogger(__name__)

BALANCED = "balanced"  # weights of classes from the data
STARTED = ("resume", "overwrite", "eval_only")  # how a run is started, not what it is: not in its configuration's file


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which detector. Every setting that is None keeps the model's own default.

    Attributes:
        model: name of the detector: conditional_detr_r50, dab_detr_r50, dn_detr_r50 (each also with _dc5),
            dab_deformable_detr_r50, dino_4scale_r50 or mask2former_r50; or transformers:DIR_OR_ID, a detector of
            Hugging Face transformers (RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR, RF-DETR, Deformable DETR,
            Conditional DETR, DAB-DETR, DETR) in a directory or on the hub, with its weights.
        num_groups: K, groups of queries in training. Of a model of transformers, the number that it has (with the
            command the default); any for its Conditional, DAB- and one-stage Deformable DETR.
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
        group_init_noise: let new groups begin as copies of group 0 with normal noise, of so many standard deviations of
            its values (such as 0.1); None for groups that begin independently of each other. Groups that a checkpoint
            ``load`` has stay as they are.
        accelerate_kernels: let a model of transformers compute with the kernels of this package.
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
    group_init_noise: float | None = None
    accelerate_kernels: bool = True

    def __post_init__(self) -> None:
        if self.group_init_noise is not None and not 0 <= self.group_init_noise < math.inf:
            raise ValueError(f"group_init_noise must be at least 0, got {self.group_init_noise}")

    @classmethod
    def of_checkpoint(cls, header: CheckpointHeader, **changes: Any) -> "ModelConfig":
        """The detector that a checkpoint describes, without weights of its backbone, which the checkpoint has itself.

        Args:
            header: of the checkpoint; settings in it that are no fields here are left out.
            **changes: fields that differ.
        """
        # Of a model of transformers, its own configuration in the header has all settings but the number of groups.
        names = [f.name for f in fields(cls)] if not header.transformers else ["num_groups"]
        settings = {name: header.model_config[name] for name in names if name in header.model_config}
        return cls(**{**settings, "model": header.model, "backbone_weights": None, **changes})

    @property
    def predicts_masks(self) -> bool:
        """Whether the detector predicts masks, and not boxes."""
        return not of_transformers(self.model) and model_config(self.model).predicts_masks

    def build(self, num_classes: int, *, resumed: Path | None = None) -> "Detector | TransformersDetector":
        """The detector as a training begins with it, with the weights of ``load`` if that is given.

        Args:
            num_classes: C.
            resumed: the checkpoint whose weights will replace those of the detector. It describes a model of
                transformers too, so that the directory which that came from is not needed again.

        Raises:
            CheckpointMismatch: if ``load`` or ``resumed`` is of another detector, or has another number of classes.
            ValueError: for settings that the detector does not have, and if it cannot be loaded.
        """
        model, trained = self._build_loaded(num_classes, resumed)
        if self.group_init_noise is not None:
            model.start_groups_near_first(self.group_init_noise, trained=trained)
        return model

    def _build_loaded(self, num_classes: int, resumed: Path | None) -> "tuple[Detector | TransformersDetector, int]":
        """The detector with the weights of ``load``, and how many of its groups have something to keep, at least 1."""
        if of_transformers(self.model):
            return self._build_transformers(num_classes, resumed)
        model, trained = self._build(num_classes), None
        if self.load is not None:
            trained = load_checkpoint(model, self.load, new_class_head=self.new_class_head).groups
        elif model.config.backbone_weights is None and not model.config.backbone.startswith("conv:"):
            logger.warning(
                "the backbone %s starts from random weights, of which the first %d stages stay as they are: "
                "pass backbone_weights (imagenet or a file) to start from pretrained ones",
                model.config.backbone,
                model.config.frozen_stages,
            )
        return model, trained[0] if trained else 1

    def resolved_num_queries(self) -> int:
        """``num_queries``, or what None stands for in this detector, which is one of this package."""
        return self.num_queries or model_config(self.model).num_queries

    def build_empty(self, num_classes: int) -> Detector:
        """The detector with random weights everywhere, for those of a checkpoint to replace."""
        return replace(self, backbone_weights=None)._build(num_classes)

    def _build_transformers(self, num_classes: int, resumed: Path | None) -> "tuple[TransformersDetector, int]":
        """The same, of a model of transformers."""
        require_transformers()
        from ..transformers_detector.build import build_from_header, load_pretrained, load_weights

        if self._overrides():
            raise ValueError(
                f"{next(iter(self._overrides()))} cannot be set for a model of transformers: its own configuration, "
                "config.json, has all its settings"
            )
        checkpoint = resumed or self.load
        if checkpoint is None:
            model = load_pretrained(
                self.model,
                num_classes=num_classes,
                num_groups=self.num_groups,
                accelerate_kernels=self.accelerate_kernels,
            )
            return model, 1
        header = CheckpointHeader() if of_transformers(checkpoint) else read_header(checkpoint)
        if not header.transformers:  # as transformers has saved it
            name = checkpoint if of_transformers(checkpoint) else f"{PREFIX}{checkpoint}"
            model = load_pretrained(str(name), accelerate_kernels=self.accelerate_kernels)
        else:
            model = build_from_header(header, num_groups=self.num_groups, accelerate_kernels=self.accelerate_kernels)
        if (own := model.config.num_classes) != num_classes and self.new_class_head:
            name = f"{PREFIX}{find_weights(place_of(checkpoint))}"
            groups = self.num_groups if header.transformers else None
            model = load_pretrained(
                name, num_classes=num_classes, num_groups=groups, accelerate_kernels=self.accelerate_kernels
            )
            return model, 1
        if own != num_classes:
            sentence = f"{checkpoint} has a class head for {own} classes, and the data have {num_classes}"
            raise CheckpointMismatch(sentence, (own, num_classes))
        if header.transformers and resumed is None:
            load_weights(model, checkpoint)
        return model, int(header.model_config.get("num_groups", 1))

    def _overrides(self) -> dict[str, Any]:
        """Settings of the detector that are given."""
        own = ("model", "num_groups", "load", "new_class_head", "group_init_noise", "accelerate_kernels")
        overrides = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return {name: value for name, value in overrides.items() if value is not None}

    def _build(self, num_classes: int) -> Detector:
        overrides = self._overrides()
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
        class_weights: None; "balanced", which weighs the class loss of an object by how rare its class is, by the
            effective number of objects (Cui et al. 2019); or a yaml file of names of classes and their weights, 1 for
            those that it leaves out.
        class_weights_beta: of "balanced", in (0, 1]: 1 / (1 - beta) objects of a class are as good as any more; with 1
            weights are inverse to the number of objects.
        output: folder of the run: configuration, checkpoints, TensorBoard curves, ``results.json`` and pictures.
        resume: continue from the newest checkpoint in ``output``.
        overwrite: replace the run that ``output`` holds; without ``resume`` or this, such a folder is refused.
        eval_only: evaluate the weights of ``load`` and stop; needs no data to train on.
        evaluate_every: epochs between evaluations.
        early_stopping: epochs without a better AP after which the training ends; 0 to train all of them.
        early_stopping_delta: by how much AP (0 to 1) must rise to count as better.
        checkpoint_every: optimiser steps between checkpoints within an epoch; 0 for none but at its end.
        checkpoint_minutes: minutes after which a checkpoint is written within an epoch, so that a run that is killed
            loses no more than these; 0 for none.
        keep_checkpoints: epochs whose weights are kept, the newest ones, besides the best; 0 for all. The two that
            can be resumed are kept in any case.
        max_skipped_steps: steps of an epoch that may be skipped because their loss is not finite.
        strict: stop at the first unreadable image and the first loss that is not finite.
        eval_batch_size: images per process that are evaluated at a time, padded to one size; None for ``batch_size``.
        top_k: detections per image in evaluation.
        pictures: images in ``predictions.png``; 0 for no picture.
        track: where curves, pictures and settings go: tensorboard (in ``output``), wandb, mlflow, trackio, several of
            them, or none.
        report: whether to write ``index.html``, the page about the run, at its end.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    assignment: Assignment = "group"
    positives: int | None = None
    class_weights: str | None = None
    class_weights_beta: float = 0.999
    output: Path = Path("runs/coco")
    resume: bool = False
    overwrite: bool = False
    eval_only: bool = False
    evaluate_every: int = 1
    early_stopping: int = 0
    early_stopping_delta: float = 0.0
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 0
    max_skipped_steps: int = 10
    strict: bool = False
    eval_batch_size: int | None = None
    top_k: int = 100
    pictures: int = 12
    track: tuple[TrackerName, ...] = ("tensorboard",)
    report: bool = True

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("give resume or overwrite, not both")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {self.evaluate_every}")
        check_selection(self.top_k)
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}")
        if of_transformers(self.model.model):
            self._check_transformers()
        if not 0 < self.class_weights_beta <= 1:
            raise ValueError(f"class_weights_beta must be in (0, 1], got {self.class_weights_beta}")
        if self.class_weights == BALANCED and self.data.repeat_factor_threshold:
            raise ValueError(
                "class_weights balanced and repeat_factor_threshold each make up for rare classes, and together twice: "
                "give one of them"
            )
        for name in ("checkpoint_minutes", "keep_checkpoints", "early_stopping", "early_stopping_delta"):
            if not getattr(self, name) >= 0:  # which also refuses what is not a number
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def with_settings(self, **settings: Any) -> "CocoTrainingConfig":
        """The same run with other settings, each under the name that its flag on the command line has (``lr``).

        Raises:
            ValueError: for a name that is no setting.
        """
        rooms = {name: getattr(self, name) for name in ("data", "model", "augmentation", "optimization")}
        owners = {each.name: room for room, config in rooms.items() for each in fields(config)}
        owners |= {each.name: "" for each in fields(CocoTrainingConfig) if each.name not in rooms}
        changes: dict[str, dict[str, Any]] = {name: {} for name in ("", *rooms)}
        for name, value in settings.items():
            if name not in owners:
                close = difflib.get_close_matches(name, owners, n=1)
                raise ValueError(f"there is no setting {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
            changes[owners[name]][name] = value
        replaced = {name: replace(config, **changes[name]) for name, config in rooms.items() if changes[name]}
        return replace(self, **replaced, **changes[""])

    def with_transformers(self, name: str, resumed: Path | None = None) -> "CocoTrainingConfig":
        """The same run of a model of transformers, with the sizes of images and the number of groups of this model.

        Args:
            name: ``transformers:DIR_OR_ID``.
            resumed: a checkpoint of the run, which says the same, so that the directory is not needed again.

        Raises:
            ValueError: if the model cannot be read.
        """
        require_transformers()
        from ..transformers_detector.source import ModelSource, read_source

        header = CheckpointHeader() if resumed is None else read_header(resumed)
        source = ModelSource.of_header(header) if header.transformers else read_source(name)
        model = replace(self.model, model=name, num_groups=source.num_groups)
        return replace(self, model=model, augmentation=source.augmentation())

    def _check_transformers(self) -> None:
        """Refuse what models of transformers cannot do."""
        given = {name: getattr(self.optimization, name) for name in ("compile", "cuda_graphs", "groups_per_pass")}
        given["assignment"] = self.assignment != "group"
        for name, value in {**given, "positives": self.positives}.items():
            if value:
                raise ValueError(f"{name} is not for models of transformers: leave it out for {self.model.model}")
        if self.class_weights is not None:
            raise ValueError(
                f"class_weights are not for models of transformers, whose losses take none: for {self.model.model} "
                "repeat images of rare classes by repeat_factor_threshold"
            )

    def as_yaml(self) -> str:
        """The configuration as ``groupdetr train --config`` reads it."""
        own = CocoTrainingConfig(**{f.name: getattr(self, f.name) for f in fields(CocoTrainingConfig)})
        return to_yaml(own, omit=STARTED)
