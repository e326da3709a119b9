"""What steps of a run are taken with: its devices, and a trainer that has all but evaluations and checkpoints."""

from dataclasses import replace

from accelerate import Accelerator

from ..training.batch_size import check_auto
from ..training.config import LoopSettings
from ..training.engine import Trainer, TrainerSettings, build_accelerator
from .batch_size import with_batch_size
from .class_weights import class_weights_of, criterion_of
from .config import CocoTrainingConfig
from .loaders import training_loader, training_samples, training_set

__all__ = ["launched", "trainer_of"]


def launched(config: CocoTrainingConfig) -> tuple[CocoTrainingConfig, Accelerator]:
    """The run with the precision that its launcher asks for, and its devices; seeds everything, and makes its folder.

    Raises:
        OSError: if there can be no such folder.
        ValueError: for settings that do not fit the device or the launcher; no folder is made then.
    """
    config = replace(config, optimization=config.optimization.as_launched())
    cudnn = not config.model.of_transformers
    accelerator = build_accelerator(config.optimization, config.output, cudnn_attention=cudnn)
    check_auto(accelerator, config.optimization)
    config.output.mkdir(parents=True, exist_ok=True)
    return config, accelerator


def trainer_of(config: CocoTrainingConfig, *, max_skipped_steps: int = LoopSettings.max_skipped_steps) -> Trainer:
    """The trainer of a run before its first step, for those who look at steps alone.

    Args:
        config: the run; what concerns evaluation and checkpoints does not matter.
        max_skipped_steps: steps of an epoch that may be skipped because their loss is not finite.

    Raises:
        DataError: for a fault in the data.
        TrainingError: if the memory is too small for one image, with ``batch_size`` "auto".
        ValueError: for settings that do not fit together.
    """
    config, accelerator = launched(config)
    dataset = training_set(config)
    samples = training_samples(dataset, config, accelerator.device)
    config = with_batch_size(config, accelerator, dataset)
    model = config.model.build(dataset.num_classes)
    return Trainer(
        accelerator,
        model,
        criterion_of(config, model, class_weights_of(config, dataset)).to(accelerator.device),
        training_loader(samples, config),
        TrainerSettings(config.optimization, config.output, max_skipped_steps=max_skipped_steps),
    )
