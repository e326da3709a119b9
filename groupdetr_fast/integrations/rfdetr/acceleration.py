"""This package's kernels in RF-DETR, exchanged in place and put back."""

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from rfdetr.detr import RFDETR
from torch import nn

from ..kernels import can_serve, exchange_parts, serves_everywhere
from . import attention, criterion
from .passes import check_passes

__all__ = ["accelerate", "restore"]

_TESTED = ((1, 11), (1, 11))  # the first and the last minor version of rfdetr that the tests ran with
_VERSION = version("rfdetr")

Model = TypeVar("Model")


def accelerate(model: Model, *, groups_per_pass: int | None = None) -> Model:
    """Let RF-DETR train and predict with this package's kernels, in place.

    Exchanged are its deformable attention, and its criterion together with the matching, which are computed for all
    layers, images and groups at once. Losses and gradients stay the same but for rounding. So do the classes of the
    model's layers to ``isinstance``, the keys of its state dict, and what it can be used for: checkpoints,
    ``copy.deepcopy``, pickle, ``export``. RF-DETR's own code still computes what this package does not: losses of masks
    and keypoints, the varifocal and the position-supervised loss, padded targets, labels outside of the model's
    classes, boxes of an area below 1e-7, and attention on a device without a kernel. Subclasses of its criterion or
    attention are left alone.

    With ``groups_per_pass`` the training step runs decoder, heads and criterion of so many groups at a time, so that
    its memory hardly grows with their number; see the documentation. Images with fewer feature positions than queries
    are still trained in one pass.

    Calling this again replaces ``groups_per_pass``.

    Args:
        model: an ``RFDETR`` such as ``RFDETRNano``, whose ``train`` then accelerates each module that it builds; an
            ``RFDETRModelModule``; or any module that has RF-DETR's layers or criterion in it.
        groups_per_pass: at least 1; None: all groups in one pass.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is none of these, or ``groups_per_pass`` is given for the last of them.
        ValueError: if ``groups_per_pass`` is below 1 or does not work with an option of the model, or there is nothing
            to exchange.

    Warns:
        UserWarning: if the version of rfdetr is none that this was tested with, or no kernel is installed; the model is
            unchanged then.
    """
    if groups_per_pass is not None and (type(groups_per_pass) is not int or groups_per_pass < 1):
        raise ValueError(f"groups_per_pass must be an integer of at least 1, got {groups_per_pass!r}")
    modules = _modules_of(model)
    exchanges = [attention.exchange] if attention.DEVICES else []
    exchanges += [criterion.exchange] if serves_everywhere("linear_assignment") else []
    if not can_serve("rfdetr", _VERSION, _TESTED, has_kernels=bool(exchanges)):
        return model
    _set_passes(model, groups_per_pass)
    if not exchange_parts(modules, exchanges) and not isinstance(model, RFDETR):
        raise ValueError(f"{type(model).__name__} has neither RF-DETR's deformable attention nor its criterion")
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate` in place; a model that was not accelerated stays as it is.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is none that :func:`accelerate` takes.
    """
    for part in _modules_of(model):
        attention.put_back(part)
        criterion.put_back(part)
    if isinstance(model, RFDETR):
        model.__dict__.pop("train", None)
    else:
        _set_passes(model, None)
    return model


def _modules_of(model: Any) -> list[nn.Module]:
    """Every module in which parts may be exchanged."""
    module = model.model.model if isinstance(model, RFDETR) else model
    if isinstance(model, RFDETR) and module is None:  # it gave its model away for inference
        return []
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be an RFDETR, an RFDETRModelModule or another module, got {type(model).__name__}")
    return list(module.modules())


def _is_training_module(model: Any) -> bool:
    """Whether it is an RFDETRModelModule; only who has one needs Lightning."""
    training = sys.modules.get("rfdetr.training.module_model")
    return training is not None and isinstance(model, training.RFDETRModelModule)


def _set_passes(model: Any, groups_per_pass: int | None) -> None:
    if isinstance(model, RFDETR):
        if groups_per_pass is not None:
            check_passes(model.model_config)
        prepare = functools.partial(accelerate, groups_per_pass=groups_per_pass)
        model.__dict__["train"] = functools.partial(_train, model, prepare)
    elif _is_training_module(model):
        from .training import run_in_passes, stop_passes

        if groups_per_pass is None:
            stop_passes(model)
        else:
            run_in_passes(model, groups_per_pass)
    elif groups_per_pass is not None:
        raise TypeError(f"groups_per_pass needs an RFDETR or an RFDETRModelModule, got {type(model).__name__}")


def _train(model: RFDETR, prepare: Callable[[nn.Module], Any], *args: Any, **kwargs: Any) -> Any:
    """``RFDETR.train``, where each training module that it builds is prepared."""
    try:
        training: Any = importlib.import_module("rfdetr.training")
    except ModuleNotFoundError:
        return type(model).train(model, *args, **kwargs)  # which says what to install
    build = training.RFDETRModelModule

    def build_and_prepare(*args: Any, **kwargs: Any) -> Any:
        return prepare(build(*args, **kwargs))

    training.RFDETRModelModule = build_and_prepare  # where RFDETR.train looks it up
    try:
        return type(model).train(model, *args, **kwargs)
    finally:
        training.RFDETRModelModule = build
