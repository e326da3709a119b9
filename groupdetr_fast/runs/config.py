"""The configuration of a run."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..build import build_criterion
from ..data import AugmentationConfig
from ..data.config import DataConfig
from ..field_types import take_field_types
from ..losses.matcher import Assignment
from ..models.checkpoints import CheckpointHeader, read_header
from ..models.postprocess import check_selection
from ..spelling import did_you_mean
from ..training.config import LoopSettings, OptimizationConfig
from ..training.tracking import TrackerName
from ..transformers_detector.families import check_accelerate_kernels, require_transformers
from .config_file import to_plain, to_yaml
from .model import ModelConfig

__all__ = ["BALANCED", "ROOMS", "CocoTrainingConfig", "ModelConfig"]

BALANCED = "balanced"  # weights of classes from the data
ROOMS = ("data", "model", "augmentation", "optimization")  # fields that hold settings of their own
STARTED = ("resume", "overwrite", "eval_only")  # how a run is started, not what it is: not in its configuration's file


@dataclass(frozen=True, kw_only=True)
class CocoTrainingConfig(LoopSettings):
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
        eval_only: evaluate the weights of ``load`` and stop; needs no data to train on. Where the command line has no
            ``output``, results go to the folder ``eval`` in that of the configuration.
        strict: stop at the first unreadable image and the first loss that is not finite.
        eval_batch_size: images per process that are evaluated at a time, padded to one size; None for ``batch_size``.
        top_k: detections per image in evaluation.
        pictures: images in ``predictions.png``; 0 for no picture.
        track: where curves, pictures and settings go: tensorboard (in ``output``), wandb, mlflow, trackio, several of
            them, or none.
        report: whether to write ``index.html``, the page about the run, at its end.

    Raises:
        ValueError: for a detector that there is not, for values of other types, and for settings that do not fit
            together.
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
    strict: bool = False
    eval_batch_size: int | None = None
    top_k: int = 100
    pictures: int = 12
    track: tuple[TrackerName, ...] = ("tensorboard",)
    report: bool = True

    def __post_init__(self) -> None:
        take_field_types(self, CocoTrainingConfig)
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("give resume or overwrite, not both")
        check_selection(self.top_k)
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {self.eval_batch_size}")
        if self.model.of_transformers:
            self._check_transformers()
        else:
            # Whether targets can be assigned so, the criterion knows.
            build_criterion(self.model.own_config(), assignment=self.assignment, positives=self.positives)
            check_accelerate_kernels(self.model.accelerate_kernels, self.model.model)
        if self.optimization.cuda_graphs and self.model.predicts_masks:
            raise ValueError(f"cuda_graphs are for detectors of boxes: leave it out for {self.model.model}")
        if not 0 < self.class_weights_beta <= 1:
            raise ValueError(f"class_weights_beta must be in (0, 1], got {self.class_weights_beta}")
        if self.class_weights == BALANCED and self.data.repeat_factor_threshold:
            raise ValueError(
                "class_weights balanced and repeat_factor_threshold each make up for rare classes, and together twice: "
                "give one of them"
            )
        if self.pictures < 0:
            raise ValueError(f"pictures must not be negative, got {self.pictures}")

    def with_settings(self, **settings: Any) -> "CocoTrainingConfig":
        """The same run with other settings, each under the name that its flag on the command line has (``lr``).

        Raises:
            ValueError: for a name that is no setting, and for a value of another type than the setting has; whole
                numbers serve as floats, lists as tuples, and texts as paths.
        """
        rooms = {name: getattr(self, name) for name in ROOMS}
        owners = {each.name: room for room, config in rooms.items() for each in fields(config)}
        owners |= {each.name: "" for each in fields(CocoTrainingConfig) if each.name not in rooms}
        changes: dict[str, dict[str, Any]] = {name: {} for name in ("", *rooms)}
        for name, value in settings.items():
            if name not in owners:
                raise ValueError(f"there is no setting {name!r}{did_you_mean(name, owners)}")
            changes[owners[name]][name] = value
        replaced = {name: replace(config, **changes[name]) for name, config in rooms.items() if changes[name]}
        return replace(self, **replaced, **changes[""])

    def with_model(self, name: str, resumed: Path | None = None) -> "CocoTrainingConfig":
        """The same run of another detector; one of transformers brings its sizes of images and number of groups.

        Args:
            name: of the detector.
            resumed: a checkpoint of the run, which says these too, so that the directory is not needed again. One of
                another kind of detector says none: the run cannot go on as one of transformers, whatever its sizes.

        Raises:
            ValueError: if there is no such detector, or the model of transformers cannot be read.
        """
        if name == self.model.model:
            return self
        model = replace(self.model, model=name)
        header = CheckpointHeader() if resumed is None else read_header(resumed)
        if not model.of_transformers or (header.model is not None and not header.transformers):
            return replace(self, model=model)
        require_transformers()
        from ..transformers_detector.source import ModelSource, read_source

        source = ModelSource.of_header(header) if header.transformers else read_source(name)
        return replace(self, model=replace(model, num_groups=source.num_groups), augmentation=source.augmentation())

    def _check_transformers(self) -> None:
        """Refuse what models of transformers cannot do."""
        given = {name: getattr(self.optimization, name) for name in ("compile", "cuda_graphs", "groups_per_pass")}
        given["assignment"] = self.assignment != "group"
        given["positives"] = self.positives is not None
        for name, value in given.items():
            if value:
                raise ValueError(f"{name} is not for models of transformers: leave it out for {self.model.model}")
        if self.class_weights is not None:
            raise ValueError(
                f"class_weights are not for models of transformers, whose losses take none: for {self.model.model} "
                "repeat images of rare classes by repeat_factor_threshold"
            )

    def as_yaml(self) -> str:
        """The configuration as ``groupdetr train --config`` reads it."""
        return to_yaml(self._bare(), omit=STARTED)

    def by_name(self) -> dict[str, Any]:
        """The settings by their full names (``optimization.lr``), but for how the run is started and where it is."""
        plain = to_plain(replace(self._bare(), optimization=self.optimization.resolved()))
        rooms = {name: value for name, value in plain.items() if isinstance(value, dict)}
        settings = {name: plain[name] for name in plain.keys() - rooms.keys() - {*STARTED, "output"}}
        return settings | {f"{room}.{name}": value for room, values in rooms.items() for name, value in values.items()}

    def _bare(self) -> "CocoTrainingConfig":
        """The run without what a subclass adds, such as a command."""
        return CocoTrainingConfig(**{each.name: getattr(self, each.name) for each in fields(CocoTrainingConfig)})
