"""Ultralytics' trainer of RT-DETR with this package's kernels."""

from typing import Any

from ultralytics.models.rtdetr.train import RTDETRTrainer

from .acceleration import accelerate

__all__ = ["AcceleratedTrainer"]


class AcceleratedTrainer(RTDETRTrainer):
    """Ultralytics' ``RTDETRTrainer`` whose model computes with this package's kernels; see :func:`accelerate`.

    For ``RTDETR("rtdetr-l.yaml").train(data=..., trainer=AcceleratedTrainer)``, on one device or several, and to
    resume. What it writes has Ultralytics' own classes.
    """

    def setup_model(self) -> Any:
        """Their own, after which the model is accelerated, wherever it comes from: in DDP it is a pickled one."""
        checkpoint = super().setup_model()
        accelerate(self.model)
        return checkpoint
