"""A training whose steps alone are of interest: no evaluations, no checkpoints."""

from pathlib import Path

from ..build import build_criterion
from ..runs.config import CocoTrainingConfig
from ..runs.loaders import order_of_training, training_loader, training_samples, training_set
from ..training.engine import Trainer, TrainerSettings
from ..training.setup import build_accelerator

__all__ = ["trainer_of"]


def trainer_of(config: CocoTrainingConfig, folder: Path) -> Trainer:
    """The trainer of a configuration, before its first step, with ``folder`` for its files."""
    optimization = config.optimization.resolved()
    accelerator = build_accelerator(optimization, folder)
    dataset = training_set(config)
    model = config.model.build(dataset.num_classes)
    samples = training_samples(dataset, config, accelerator.device)
    loader = training_loader(samples, config, *order_of_training(dataset, config))
    return Trainer(accelerator, model, build_criterion(model), loader, TrainerSettings(optimization, folder))
