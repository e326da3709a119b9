"""Ultralytics' trainer of RT-DETR with this package's kernels."""

from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.nn.tasks import load_checkpoint, yaml_model_load

from . import kept_groups, parts

__all__ = ["AcceleratedTrainer"]

HEAD = "RTDETRDecoder"  # as descriptions of models have it


class AcceleratedTrainer(RTDETRTrainer):
    """Ultralytics' ``RTDETRTrainer`` whose model computes with this package's kernels; see ``acceleration.accelerate``.

    For ``RTDETR("rtdetr-l.yaml").train(data=..., trainer=AcceleratedTrainer)``, on one device or several, and to
    resume. What it writes has Ultralytics' own classes. A trainer that is to resume a training of
    :func:`group_trainer` raises ValueError, and one for a model of YOLO TypeError.
    """

    num_groups: ClassVar[int] = 1

    def check_resume(self, overrides: Any) -> None:
        """Their own, and whether the groups of the checkpoint are there; before anything is written."""
        super().check_resume(overrides)
        if not self.resume:
            return
        path = Path(self.args.model)
        if self.num_groups > 1 or (path.parent / kept_groups.KEPT).exists():
            _, checkpoint = load_checkpoint(path)
            if checkpoint.get("ema") is not None:  # else that training has ended, which Ultralytics says
                kept_groups.heads_of(path, checkpoint, self.num_groups)

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Their own, for a description of RT-DETR alone."""
        described = cfg if isinstance(cfg, dict) else yaml_model_load(cfg)
        head = described["head"][-1][2]
        if head != HEAD:
            raise TypeError(
                f"this trainer is for RT-DETR, and this model has the head {head}: load RT-DETR by RTDETR(...)"
            )
        return super().get_model(cfg, weights, verbose)

    def setup_model(self) -> Any:
        """Their own, after which the model is accelerated, wherever it comes from: in DDP it is a pickled one."""
        checkpoint = super().setup_model()
        parts.exchange(self.model)
        return checkpoint
