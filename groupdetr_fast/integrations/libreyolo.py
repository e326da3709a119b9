"""This package's deformable attention in LibreYOLO's models, by the slot that it keeps open for kernels.

LibreYOLO asks its registry ``libreyolo.kernels`` for an implementation of ``ms_deform_attn`` before it runs its own, in
LW-DETR, RF-DETR, Deformable DETR, RT-DETR, D-FINE's family and Grounding DINO.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .deformable_attention import attend
from .kernels import DEVICES, has_kernel

__all__ = ["register_kernels", "unregister_kernels"]

_SLOT, _NAME = "ms_deform_attn", "groupdetr_fast"


def register_kernels() -> None:
    """Let LibreYOLO's models compute multi-scale deformable attention by :func:`groupdetr_fast.ops.ms_deform_attn`.

    That is for training and inference, in float32, float16 and bfloat16, on the devices for which a kernel is
    installed; elsewhere, and in traces and exports, LibreYOLO runs its own code. Results and gradients stay the same
    but for rounding. Calling this again changes nothing. The variable ``LIBREYOLO_KERNELS`` of LibreYOLO goes on to
    choose: ``off`` for none, ``groupdetr_fast`` for this alone.

    Raises:
        ImportError: if LibreYOLO, or its registry of kernels, is not installed.
    """
    kernels = _registry()
    kernels.resolve(_SLOT)  # LibreYOLO's own register on the first use, and would else come after this and be preferred
    _remove(kernels)
    kernels.register(_SLOT, _ms_deform_attn, name=_NAME, predicate=lambda: bool(DEVICES))


def unregister_kernels() -> None:
    """Undo :func:`register_kernels`; without it nothing changes.

    Raises:
        ImportError: if LibreYOLO, or its registry of kernels, is not installed.
    """
    _remove(_registry())


def _registry() -> ModuleType:
    try:
        from libreyolo import kernels
    except ImportError as error:
        raise ImportError(f"{__name__} needs libreyolo 1.6 or newer, which has the slot {_SLOT} ({error})") from error
    return kernels


def _remove(kernels: ModuleType) -> None:
    kernels.unregister(_SLOT, _NAME)
    kernels.clear_cache()  # unregister leaves what was resolved before


def _ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor | Sequence[Sequence[int]], locations: Tensor, weights: Tensor
) -> Tensor | None:
    """What LibreYOLO calls.

    Args:
        value: ``[B, S, H, D]``.
        spatial_shapes: ``(h, w)`` of each level, ``[levels, 2]`` int64 on the device of ``value``.
        locations: ``[B, Lq, H, levels, P, 2]``.
        weights: ``[B, Lq, H, levels, P]``; under autocast these types differ.

    Returns:
        ``[B, Lq, H * D]`` in the dtype of ``value``, or None where LibreYOLO is to run its own code.
    """
    if not has_kernel(value.device):
        return None
    shapes = _sizes(spatial_shapes)
    if shapes is None:
        return None
    return attend(value, shapes, locations, weights)


# Sizes on the host of tensors that were seen, with their version: every layer gets the same one.
_known_sizes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _sizes(spatial_shapes: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]] | None:
    """The sizes as numbers; reading them waits for a GPU, once for each tensor. None where a graph capture forbids it.

    Tensors made in inference mode have no version by which a change could be seen, and are read every time.
    """
    if not isinstance(spatial_shapes, Tensor):
        return [(int(height), int(width)) for height, width in spatial_shapes]
    version = None if spatial_shapes.is_inference() else spatial_shapes._version
    if version is not None and (known := _known_sizes.get(spatial_shapes)) is not None and known[0] == version:
        return known[1]
    if spatial_shapes.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    sizes = [(height, width) for height, width in spatial_shapes.tolist()]
    if version is not None:
        _known_sizes[spatial_shapes] = (version, sizes)
    return sizes
