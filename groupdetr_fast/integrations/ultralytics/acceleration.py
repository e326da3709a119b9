"""This package's kernels in Ultralytics' RT-DETR, exchanged in place and put back."""

from typing import Any, TypeVar

from torch import nn
from ultralytics import RTDETR

from . import parts
from .exchange import SavedAsTheirs, set_class
from .training import AcceleratedTrainer

__all__ = ["accelerate", "restore"]

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Let Ultralytics' RT-DETR train and predict with this package's kernels, in place.

    Exchanged are its deformable attention, and its criterion together with the matching, which are computed for all
    layers and images at once, of the denoising queries too. Losses and gradients stay the same but for rounding. So do
    the keys of the model's state dict, and what it can be used for: training, validation, prediction, export,
    ``copy``; pickles and checkpoints have Ultralytics' own classes, and load without this package. Its own code still
    computes what this package does not: criteria with other options than RT-DETR's, attention and criteria on a device
    without a kernel, traces and exports. Subclasses of its attention, criterion or model are left alone. A module that
    is given another class computes as that class does; torch's ``fully_shard`` gives those that it shards a subclass of
    Ultralytics'.

    Calling this again changes nothing.

    Args:
        model: an ``RTDETR``, whose ``train`` then takes :class:`AcceleratedTrainer` for its trainer; an
            ``RTDETRDetectionModel``; or any module that has parts of these in it.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is no module, or an ``RTDETR`` of an exported file.
        ValueError: if there is nothing to exchange.

    Warns:
        UserWarning: if the version of ultralytics is none that this was tested with, or no kernel is installed; the
            model is unchanged then.
    """
    if parts.exchange(_module_of(model)) and type(model) is RTDETR:
        set_class(model, _RTDETR)
        model.predictor = None  # which has a copy of the model as it was
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate` in place; a model that was not accelerated stays as it is.

    Where a training with :func:`group_trainer` was broken off, the model still has its groups: it keeps the first.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is none that :func:`accelerate` takes.
    """
    parts.put_back(_module_of(model))
    if type(model) is _RTDETR:
        set_class(model, RTDETR)
        model.predictor = None
    return model


def _module_of(model: Any) -> nn.Module:
    """The module in which parts may be exchanged."""
    module = model.model if isinstance(model, RTDETR) else model
    if not isinstance(module, nn.Module):
        what = f"an RTDETR of {module}" if isinstance(model, RTDETR) else type(model).__name__
        raise TypeError(f"model must be an RTDETR of a .pt or .yaml file, or a module, got {what}")
    return module


class _RTDETR(SavedAsTheirs, RTDETR):
    theirs = RTDETR

    def train(self, trainer: type | None = None, **kwargs: Any) -> Any:
        """Their own, with the trainer of this package unless another is given."""
        metrics = super().train(trainer or AcceleratedTrainer, **kwargs)
        accelerate(self.model)  # which Ultralytics has read from the best checkpoint
        return metrics
