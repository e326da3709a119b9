"""RF-DETR's deformable attention by :func:`groupdetr_fast.ops.ms_deform_attn`."""

from rfdetr.models.ops.modules import MSDeformAttn
from torch import Tensor, nn

from ..deformable_attention import attend_as
from ..kernels import DEVICES, has_kernel

__all__ = ["DEVICES", "exchange", "is_exchanged", "put_back"]


def exchange(module: nn.Module) -> bool:
    """Let a module compute by the op, in place, if it is RF-DETR's deformable attention itself; whether it does now."""
    if type(module) is MSDeformAttn:
        module.__class__ = _MSDeformAttn
    return is_exchanged(module)


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange`."""
    if is_exchanged(module):
        module.__class__ = MSDeformAttn


def is_exchanged(module: nn.Module) -> bool:
    return type(module) is _MSDeformAttn


class _MSDeformAttn(MSDeformAttn):
    """Their own code runs where there is no kernel, and once ``export()`` was called."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
        input_spatial_shapes_hw: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        fits = reference_points.dim() == 4 and reference_points.shape[2] in (1, self.n_levels)
        if self._export or input_spatial_shapes_hw is None or not fits or not has_kernel(query.device):
            return super().forward(
                query,
                reference_points,
                input_flatten,
                input_spatial_shapes,
                input_level_start_index,
                input_padding_mask,
                input_spatial_shapes_hw=input_spatial_shapes_hw,
            )
        shapes, sizes = input_spatial_shapes_hw, input_spatial_shapes
        return attend_as(self, query, reference_points, input_flatten, shapes, input_padding_mask, sizes)
