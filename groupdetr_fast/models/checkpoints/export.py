"""Writing a detector's weights for other code."""

from pathlib import Path
from typing import Literal

import torch

from ..config import DetectorConfig
from ..deformable import DeformableConfig
from ..detector import Detector
from .layouts import StateDict
from .original import original_keys

__all__ = ["export_checkpoint"]


def export_checkpoint(
    model: Detector,
    path: str | Path | None,
    layout: Literal["original"] = "original",
    group: int = 0,
) -> StateDict:
    """Write one group of a detector as the file of its original repository, for that repository's code to run.

    Heads that the original model shares between modules appear under each of their keys, as in its own files.

    Args:
        model: a detector of this package.
        path: where to write ``{"model": state_dict}`` as ``torch.save`` does, which the original repositories'
            ``--resume`` and ``--pretrain_model_path`` read; None to write nothing.
        layout: whose names the tensors get; the original repository's.
        group: the group whose queries are kept.

    Returns:
        The state dict, on the CPU.

    Raises:
        TypeError: if the model is not a detector of this package.
        ValueError: for an unknown layout, a group that the model does not have, or a model that the original code
            cannot build.
    """
    if layout != "original":
        raise ValueError(f'layout must be "original", got {layout!r}')
    keys_of = original_keys(model)
    config = model.config
    if not 0 <= group < config.num_groups:
        raise ValueError(f"group must be in [0, {config.num_groups}), got {group}")
    _check_expressible(model)
    state: StateDict = {}
    for name, tensor in model.state_dict().items():
        if name in model.group_parameters:
            tensor = tensor.unflatten(0, (config.num_groups, -1))[group]
        tensor = tensor.detach().cpu().clone()  # of a view, torch.save would write the whole storage
        state |= dict.fromkeys(keys_of(name), tensor)
    if path is not None:
        torch.save({"model": state}, path)
    return state


def _check_expressible(model: Detector) -> None:
    config = model.config
    if ":" in config.backbone or config.backbone_stages not in (None, 4):
        raise ValueError(f"the original code has whole ResNets as backbones, not {config.backbone!r}")
    if isinstance(config, DetectorConfig) and config.input_norm != isinstance(config, DeformableConfig):
        raise ValueError(
            "the original code normalises projected features in deformable detectors alone, "
            f"this model has input_norm={config.input_norm}"
        )
