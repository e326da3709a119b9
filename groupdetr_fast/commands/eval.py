"""The command ``groupdetr eval``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.config import DataConfig, Split
from ..prediction import InferenceSettings, describe_model
from ..runs.config import CocoTrainingConfig, ModelConfig
from ..runs.evaluate import evaluate_checkpoint
from ..training.config import OptimizationConfig
from ..transformers_detector.families import of_transformers
from .flags import CheckpointArgument, ImageFlags, require_checkpoint

__all__ = ["EvalCommand"]


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Evaluate a checkpoint on data in COCO's or YOLO's format.

    Attributes:
        checkpoint: file or folder of this package, such as that of a run, of an original repository or transformers;
            or transformers:DIR_OR_ID, for a model of transformers in a directory or on the hub.
        model: name of the detector, for checkpoints without it (this package stores it); transformers:DIR_OR_ID, with
            no checkpoint, evaluates that model as it is.
        data_path: folder of a data set in COCO's layout, that of Roboflow's COCO export, or YOLO's.
        split: the part of ``data_path`` to evaluate on: "val", or "test".
        coco_path: folder with COCO's ``val2017/`` and ``annotations/``; or name the two below.
        val_images: folder of images.
        val_annotations: COCO json.
        labels: "contiguous" or "category_id", for checkpoints without that setting; "category_id" is what the
            original repositories use.
        batch_size: images per process and step.
        workers: processes that load images, per process; None for what the machine has cores for.
        precision: "no" for float32, or the type of mixed precision; None for that of accelerate launch, or else "no".
        tf32: round the factors of float32 products to TF32 on GPUs that have it.
        accelerate_kernels: let a model of transformers compute with the kernels of this package.
        top_k: detections per image.
        output: folder for ``metrics.json``, ``detections.json`` and ``predictions.png``.
        pictures: images in ``predictions.png``; 0 for no picture.
        report: whether to write ``index.html``, the page about the evaluation.
    """

    checkpoint: CheckpointArgument = None
    model: str | None = None
    data_path: Path | None = None
    split: Split = "val"
    coco_path: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None
    labels: Literal["contiguous", "category_id"] | None = None
    batch_size: int = OptimizationConfig().images_per_batch
    workers: int | None = DataConfig.workers
    precision: Literal["no", "bf16", "fp16"] | None = OptimizationConfig.precision
    tf32: bool = OptimizationConfig.tf32
    accelerate_kernels: bool = ModelConfig.accelerate_kernels
    top_k: int = CocoTrainingConfig.top_k
    output: Path = Path("runs/eval")
    pictures: int = CocoTrainingConfig.pictures
    report: bool = CocoTrainingConfig.report
    input: ImageFlags = field(default_factory=ImageFlags)

    def __call__(self) -> None:
        evaluate_checkpoint(self.config())

    def config(self) -> CocoTrainingConfig:
        """The evaluation as a run.

        Raises:
            DataError: if there is no such part of the data.
            ValueError: if no checkpoint is named, or neither it nor the flags name the detector.
        """
        checkpoint = self.checkpoint
        if checkpoint is None and of_transformers(self.model):
            checkpoint = Path(str(self.model))
        checkpoint = require_checkpoint(checkpoint, "groupdetr eval CHECKPOINT --data-path DIR")
        header = describe_model(checkpoint, self.model)
        return CocoTrainingConfig(
            data=DataConfig(
                data_path=self.data_path,
                coco_path=self.coco_path,
                val_images=self.val_images,
                val_annotations=self.val_annotations,
                labels=self.labels or header.labels,
                workers=self.workers,
            ).evaluated_on(self.split),
            model=ModelConfig.of_checkpoint(
                header,
                load=checkpoint,
                num_groups=1,  # one is enough
                accelerate_kernels=self.accelerate_kernels,
            ),
            augmentation=InferenceSettings.from_header(header).with_sizes(**self.input.given()).augmentation,
            optimization=OptimizationConfig(batch_size=self.batch_size, precision=self.precision, tf32=self.tf32),
            output=self.output,
            eval_only=True,
            top_k=self.top_k,
            pictures=self.pictures,
            report=self.report,
        )
