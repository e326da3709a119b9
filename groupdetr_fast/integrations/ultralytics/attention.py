"""Ultralytics' deformable attention by :func:`groupdetr_fast.ops.ms_deform_attn`."""

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.transformer import MSDeformAttn

from ..deformable_attention import Shapes, attend_as
from ..kernels import DEVICES, has_kernel
from .exchange import SavedAsTheirs, set_class

__all__ = ["DEVICES", "exchange", "is_exchanged", "put_back"]


def exchange(module: nn.Module) -> bool:
    """Let a module compute by the op, in place, if it is Ultralytics' deformable attention; whether it does now."""
    if type(module) is MSDeformAttn:
        set_class(module, _MSDeformAttn)
    return is_exchanged(module)


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange`."""
    if is_exchanged(module):
        set_class(module, MSDeformAttn)


def is_exchanged(module: nn.Module) -> bool:
    return type(module) is _MSDeformAttn


class _MSDeformAttn(SavedAsTheirs, MSDeformAttn):
    """Their own code runs where there is no kernel, and in traces and exports."""

    theirs = MSDeformAttn

    def forward(
        self,
        query: Tensor,
        refer_bbox: Tensor,
        value: Tensor,
        value_shapes: Shapes,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        fits = refer_bbox.dim() == 4 and refer_bbox.shape[2] == 1 and refer_bbox.shape[3] in (2, 4)
        if not fits or _is_exported() or not has_kernel(query.device):
            return super().forward(query, refer_bbox, value, value_shapes, value_mask)
        return attend_as(self, query, refer_bbox, value, value_shapes, value_mask)


def _is_exported() -> bool:
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()
