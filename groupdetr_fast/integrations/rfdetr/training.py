"""RF-DETR's Lightning module with a training step in passes."""

from typing import Any

import torch
from rfdetr.training.module_model import RFDETRModelModule

from .passes import GroupPasses, check_passes

__all__ = ["run_in_passes", "stop_passes"]


def run_in_passes(module: RFDETRModelModule, groups_per_pass: int) -> None:
    """Let the training step of a module run ``groups_per_pass`` groups at a time, in place.

    Raises:
        TypeError: if it is a subclass, whose training step may be another.
        ValueError: if an option of the model does not go with passes.
    """
    if type(module) not in (RFDETRModelModule, _ModelModule):
        raise TypeError(f"groups_per_pass needs an RFDETRModelModule itself, got its subclass {type(module).__name__}")
    check_passes(module.model_config)
    module.__class__ = _ModelModule
    module.groups_per_pass = groups_per_pass


def stop_passes(module: RFDETRModelModule) -> None:
    """Undo :func:`run_in_passes`."""
    if type(module) is _ModelModule:
        module.__class__ = RFDETRModelModule
        del module.groups_per_pass


class _ModelModule(RFDETRModelModule):
    groups_per_pass: int

    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> Any:
        """Their own training step, to which a :class:`GroupPasses` is both model and criterion."""
        passes = GroupPasses(self.model, self.criterion, self.groups_per_pass, self._scale_of_gradients())
        self.__dict__.update(model=passes.encode, criterion=passes)  # hides the submodules of these names
        try:
            return super().training_step(batch, batch_idx)
        finally:
            del self.__dict__["model"], self.__dict__["criterion"]

    def _scale_of_gradients(self) -> torch.Tensor | float:
        """What the precision plugin's GradScaler will multiply the loss by; 1 without one."""
        try:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        except RuntimeError:  # there is no trainer
            return 1.0
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))
