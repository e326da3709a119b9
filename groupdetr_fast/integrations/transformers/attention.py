"""Multi-scale deformable attention of transformers' models by :func:`groupdetr_fast.ops.ms_deform_attn`.

transformers has it in three forms, each of which is exchanged in the way that changes least: a module without
parameters, a function that is an attribute of a module, and a function of the modeling file, whose callers get a
subclass. On a device for which there is no kernel, all of them run transformers' own code.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)
from transformers.models.oneformer.modeling_oneformer import OneFormerPixelDecoderEncoderMultiscaleDeformableAttention
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2MultiscaleDeformableAttention

from ..deformable_attention import Shapes, attend, locations_around, project
from ..kernels import DEVICES, has_kernel

__all__ = ["DEVICES", "exchange", "put_back"]

_MODULE = "MultiScaleDeformableAttention"  # the class of the same body in ten modeling files
_FUNCTION = "multi_scale_deformable_attention_v2"  # of the same body in those of D-FINE, DEIMv2 and RT-DETR v2


def exchange(module: nn.Module) -> bool:
    """Let a module compute by the op, in place, if it is one of transformers' that can; whether it does now."""
    cls = type(module)
    if cls.__name__ == _MODULE and cls.__module__.startswith("transformers."):
        module.__class__ = _MultiScaleDeformableAttention
        module.exchanged_class = cls
    elif cls in _SUBCLASSES:
        module.__class__ = _SUBCLASSES[cls]
    elif getattr(getattr(module, "ms_deformable_attn_core", None), "__name__", None) == _FUNCTION:
        module.ms_deformable_attn_core = _attend_unequal_points
    return _is_exchanged(module)


def put_back(module: nn.Module) -> None:
    """Undo :func:`exchange`."""
    if not _is_exchanged(module):
        return
    if isinstance(module, _MultiScaleDeformableAttention):
        module.__class__ = module.exchanged_class
        del module.exchanged_class
    elif type(module) in _SUBCLASSES.values():
        module.__class__ = type(module).__bases__[-1]
    else:
        modeling = sys.modules[type(module).__module__]  # D-FINE's or DEIMv2's, each of which has its own
        module.ms_deformable_attn_core = getattr(modeling, _FUNCTION)


def _is_exchanged(module: nn.Module) -> bool:
    return (
        isinstance(module, _MultiScaleDeformableAttention)
        or type(module) in _SUBCLASSES.values()
        or getattr(module, "ms_deformable_attn_core", None) is _attend_unequal_points
    )


class _MultiScaleDeformableAttention(nn.Module):
    """In place of the class of that name in ten modeling files; it has neither parameters nor state."""

    exchanged_class: type[nn.Module]

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Shapes,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if has_kernel(value.device):
            return attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)
        return self.exchanged_class.forward(
            self,
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            sampling_locations,
            attention_weights,
            *args,
            **kwargs,
        )


def _attend_unequal_points(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """With points ``[B, Lq, H, sum of points, 2]`` of all levels side by side, which may have different numbers."""
    if method != "default" or not has_kernel(value.device):
        return multi_scale_deformable_attention_v2(
            value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method
        )
    most = max(num_points_list)
    outside = -1.0  # a whole map away from the map, where the op reads nothing
    locations = torch.stack(
        [
            F.pad(points, (0, 0, 0, most - points.shape[-2]), value=outside)
            for points in sampling_locations.split(num_points_list, dim=-2)
        ],
        dim=-3,
    )
    weights = torch.stack(
        [F.pad(points, (0, most - points.shape[-1])) for points in attention_weights.split(num_points_list, dim=-1)],
        dim=-2,
    )
    return attend(value, value_spatial_shapes, locations, weights)


class _RTDetrV2Attention(RTDetrV2MultiscaleDeformableAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Shapes | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if self.method != "default" or reference_points.shape[-1] != 4 or not has_kernel(hidden_states.device):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                **kwargs,
            )
        padding = None if attention_mask is None else ~attention_mask
        value, offsets, weights = project(self, hidden_states, encoder_hidden_states, padding, position_embeddings)
        center, size = reference_points[:, :, None, :, None].split(2, dim=-1)
        scale = self.n_points_scale.to(offsets.dtype).view(self.n_levels, self.n_points, 1)
        locations = center + offsets * scale * size * self.offset_scale
        out = attend(value, spatial_shapes_list, locations, weights)
        return self.output_proj(out), weights.flatten(-2)


class _PixelDecoderAttention:
    """Of the two universal segmenters, whose pixel decoders have the same attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes_list: Shapes | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if reference_points.shape[-1] != 2 or not has_kernel(hidden_states.device):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes_list=spatial_shapes_list,
                **kwargs,
            )
        padding = attention_mask  # True where there is no image, other than in the detectors
        value, offsets, weights = project(self, hidden_states, encoder_hidden_states, padding, position_embeddings)
        locations = locations_around(reference_points, offsets, spatial_shapes_list)
        out = attend(value, spatial_shapes_list, locations, weights)
        return self.output_proj(out), weights


class _Mask2FormerAttention(_PixelDecoderAttention, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    pass


class _OneFormerAttention(_PixelDecoderAttention, OneFormerPixelDecoderEncoderMultiscaleDeformableAttention):
    pass


_SUBCLASSES = {cls.__bases__[-1]: cls for cls in (_RTDetrV2Attention, _Mask2FormerAttention, _OneFormerAttention)}
