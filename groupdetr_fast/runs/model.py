"""The detector of a run: its settings, and how it is built from them and from a checkpoint."""

import logging
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.ground_truth import IouType
from ..field_types import take_field_types
from ..models import build_model, load_checkpoint, model_config
from ..models.checkpoints import CheckpointHeader, CheckpointMismatch
from ..models.config import BaseConfig
from ..models.detector import Detector
from ..prediction import describe_model
from ..transformers_detector.families import of_transformers, require_transformers

if TYPE_CHECKING:
    from ..transformers_detector.detector import TransformersDetector

__all__ = ["ModelConfig"]

logger = logging.getLogger(__name__)


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
        frozen_stages: stages of the backbone that are not trained, the first ones; of a ResNet, the stem is one.
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

    Raises:
        ValueError: for a detector that there is not, a setting that it does not have, and a value of another type or
            out of bounds.
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
        take_field_types(self, ModelConfig)
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {self.num_groups}")
        if not self.of_transformers:
            self.own_config()  # which checks the settings that it has, and that it has them
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
    def of_transformers(self) -> bool:
        """Whether it is a detector of transformers."""
        return of_transformers(self.model)

    @property
    def predicts_masks(self) -> bool:
        """Whether the detector predicts masks, and not boxes."""
        return not self.of_transformers and model_config(self.model).predicts_masks

    @property
    def iou_type(self) -> IouType:
        """What the metric compares: the masks of a detector that predicts some, else boxes."""
        return "segm" if self.predicts_masks else "bbox"

    def own_config(self) -> BaseConfig:
        """The configuration of the detector, which is one of this package, with its own number of classes."""
        return model_config(self.model, num_groups=self.num_groups, **self._overrides())

    def resolved_num_queries(self) -> int:
        """``num_queries``, or what None stands for in this detector, which is one of this package."""
        return self.own_config().num_queries

    def build(self, num_classes: int, *, resumed: Path | None = None) -> "Detector | TransformersDetector":
        """The detector as a training begins with it, with the weights of ``load`` if that is given.

        Args:
            num_classes: C.
            resumed: a checkpoint of the run, whose weights will replace those of the detector: neither ``load`` nor
                weights of the backbone nor the directory of a model of transformers are needed then.

        Raises:
            CheckpointMismatch: if ``load`` is of another detector, or has another number of classes; ``resumed`` only
                for a model of transformers, which alone is built as its header says.
            ValueError: for settings that the detector does not have, and if it cannot be loaded.
        """
        if resumed is not None:
            return self.build_untrained(num_classes, resumed=resumed)
        model, trained = self._load_transformers(num_classes) if self.of_transformers else self._load_own(num_classes)
        if self.group_init_noise is not None:
            model.start_groups_near_first(self.group_init_noise, trained=trained)
        return model

    def build_untrained(
        self, num_classes: int | None = None, *, resumed: Path | None = None
    ) -> "Detector | TransformersDetector":
        """The detector as it is before any training here: random weights, or those a model of transformers comes with.

        A detector of this package gets neither ``load`` nor weights of its backbone. A model of transformers has the
        weights of ``load``, or else of its directory, since these describe it too.

        Args:
            num_classes: C; None for that of the original detector, or of the model of transformers.
            resumed: a checkpoint of the run, by whose header a model of transformers is built, with random weights.

        Raises:
            CheckpointMismatch, ValueError: as :meth:`build`, for a model of transformers.
            ValueError: for settings that the detector does not have.
        """
        if self.of_transformers and resumed is not None:
            return replace(self, load=resumed)._load_transformers(num_classes, weights=False)[0]
        if self.of_transformers:
            return self._load_transformers(num_classes)[0]
        return replace(self, backbone_weights=None)._build(num_classes or model_config(self.model).num_classes)

    def _load_own(self, num_classes: int) -> tuple[Detector, int]:
        """A detector of this package, and how many of its groups have something to keep, at least 1."""
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

    def _load_transformers(
        self, num_classes: int | None, *, weights: bool = True
    ) -> "tuple[TransformersDetector, int]":
        """The same for a model of transformers; without ``weights``, its weights are random where they can be."""
        require_transformers()
        from ..transformers_detector.build import load_detector, load_pretrained

        if self._overrides():
            raise ValueError(
                f"{next(iter(self._overrides()))} cannot be set for a model of transformers: its own configuration, "
                "config.json, has all its settings"
            )
        settings: dict[str, Any] = {"num_groups": self.num_groups, "accelerate_kernels": self.accelerate_kernels}
        if self.load is None:
            return load_pretrained(self.model, num_classes=num_classes, **settings), 1
        classes = num_classes if self.new_class_head else None
        model, trained = load_detector(self.load, num_classes=classes, weights=weights, **settings)
        own = model.config.num_classes
        if num_classes not in (None, own):
            sentence = f"{self.load} has a class head for {own} classes, and the data have {num_classes}"
            raise CheckpointMismatch(sentence, (own, num_classes))
        if weights:
            self._require_architecture(model)
        return model, trained

    def _require_architecture(self, loaded: "TransformersDetector") -> None:
        """Refuse ``load`` of another architecture than that of ``model``, whose directory may be gone."""
        from ..transformers_detector.source import read_source

        assert self.load is not None
        if describe_model(self.load, self.model).model == self.model:
            return
        try:
            named = read_source(self.model).config["model_type"]
        except ValueError:
            return
        own = loaded.describe()["config"]["model_type"]
        if own != named:
            raise CheckpointMismatch(f"{self.load} is a model {own}, and {self.model} is a model {named}: name its own")

    def _build(self, num_classes: int) -> Detector:
        overrides = self._overrides()
        return build_model(self.model, num_classes=num_classes, num_groups=self.num_groups, **overrides)

    def _overrides(self) -> dict[str, Any]:
        """Settings of the detector that are given."""
        own = ("model", "num_groups", "load", "new_class_head", "group_init_noise", "accelerate_kernels")
        overrides = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return {name: value for name, value in overrides.items() if value is not None}
