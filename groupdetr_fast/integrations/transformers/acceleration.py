"""This package's kernels in models of transformers, exchanged in place and put back."""

from torch import nn
from transformers import PreTrainedModel, __version__

from ..kernels import can_serve, exchange_parts, serves_everywhere
from . import attention, masks
from .losses import DetectionLoss, LwDetrLoss

__all__ = ["accelerate", "restore"]

_TESTED = ((5, 23), (5, 24))  # the first and the last minor version of transformers that the tests ran with

# What the classes of models compute as their loss.
_LOSSES = {
    "ConditionalDetrForObjectDetection": DetectionLoss,
    "DabDetrForObjectDetection": DetectionLoss,
    "DeformableDetrForObjectDetection": DetectionLoss,
    "LwDetrForObjectDetection": LwDetrLoss,
    "RfDetrForObjectDetection": LwDetrLoss,
}


def accelerate(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model of transformers compute with this package's kernels, in place.

    Exchanged are multi-scale deformable attention, in every part of the model that has it (Deformable DETR, Grounding
    DINO, MM Grounding DINO, LW-DETR, RF-DETR, RT-DETR, RT-DETR v2, D-FINE, DEIMv2, OmDet-Turbo, PP-DocLayout V2 to V4,
    Mask2Former, OneFormer), matching and loss (``Conditional``, ``Dab``, ``Deformable``, ``Lw`` and
    ``RfDetrForObjectDetection``), which are computed for all layers, images and groups at once, and matching and losses
    of masks (Mask2Former, OneFormer, EoMT), at the same random points. A loss for which the installed package lacks a
    kernel on one of this machine's devices stays as it is, and attention runs transformers' code on a device for which
    there is no kernel.

    Outputs, losses and gradients stay the same but for rounding. So do the class of the model, the keys of its state
    dict and what it can be used for: ``Trainer``, ``save_pretrained``, ``copy.deepcopy``, pickle, ``torch.compile``,
    ``torch.export``. One loss differs: that of LW-DETR and RF-DETR in evaluation mode, which is of one group of
    ``num_queries`` here.

    A loss function that was set on the model, and a criterion or matcher of another class than transformers' own, are
    left alone. Calling this again changes nothing.

    Args:
        model: a model of transformers, not wrapped or compiled, with one of the parts above.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is not a ``PreTrainedModel``.
        ValueError: if it was loaded with ``use_kernels=True``, whose kernels take the same place, or has none of
            the parts.

    Warns:
        UserWarning: if the version of transformers is none that this was tested with, or no kernel is installed; the
            model is unchanged then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, got {type(model).__name__}: accelerate a model before "
            "it is wrapped or compiled"
        )
    if getattr(model, "use_kernels", False):
        raise ValueError("use_kernels=True puts other kernels in the same place: load the model without it")
    serves_losses = serves_everywhere("linear_assignment")
    exchanges = [attention.exchange] if attention.DEVICES else []
    exchanges += [masks.exchange] if serves_losses else []
    if not can_serve("transformers", __version__, _TESTED, has_kernels=bool(exchanges)):
        return model
    exchanged = exchange_parts(model.modules(), exchanges)
    loss = _LOSSES.get(type(model).__name__)
    if loss is not None and serves_losses:
        exchanged = True
        if "_loss_function" not in vars(model):
            model.loss_function = loss()
    if not exchanged:
        raise ValueError(
            f"{type(model).__name__} has neither the deformable attention nor the loss of a detector that accelerate "
            "has kernels for: use it as it is"
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate` in place; a model that was not accelerated stays as it is.

    Returns:
        The same model.
    """
    for module in model.modules():
        attention.put_back(module)
        masks.put_back(module)
    loss = vars(model).get("_loss_function")
    if isinstance(loss, DetectionLoss) and loss.queries_per_group is None:  # else it is that of add_groups
        del model._loss_function
    return model
